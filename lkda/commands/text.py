"""Between text and tokens, for prompts and for a stream of drawn tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from lkda.checks import InputError
from lkda.data.text.tokenizer import document_start, encode_text


def check_text(name: str, value: object) -> str:
    """`value`, which must be text that UTF-8 can hold. Raises ValueError naming the setting."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}; in quotes of its own, as in '\"{value}\"', it is text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are none come as lone surrogates
        raise InputError(f"{name} is not UTF-8: {error}.") from error
    return value


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """[1, T]: the token that begins a document, where the tokenizer has one, then the prompt's characters.

    Raises: ValueError for an empty prompt where no token begins a document: nothing is left to continue.
    """
    start = document_start(tokenizer)
    tokens = [*([] if start is None else [start]), *encode_text(tokenizer, prompt)]
    if not tokens:
        raise InputError("the prompt is empty, and the tokenizer has no token that begins a document: give a prompt.")
    return torch.tensor([tokens])


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece as it is complete; special tokens are no text.

    A character of several bytes may span tokens: its piece comes with its last one. What a last, incomplete character
    left behind comes as U+FFFD.
    """
    stream = DecodeStream(skip_special_tokens=True)
    drawn: list[int] = []
    shown = ""
    for token in tokens:
        drawn.append(token)
        piece = stream.step(tokenizer, token)
        if piece:
            shown += piece
            yield piece
    rest = tokenizer.decode(drawn)[len(shown) :]
    if rest:
        yield rest
