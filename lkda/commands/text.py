"""Converts prompts to tokens, and sampled tokens to text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from lkda.checks import InputError
from lkda.data.text.tokenizer import document_start, encode_text


def check_text(name: str, value: object) -> str:
    """Return `value`. Raises InputError, naming the setting, unless it is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}; add quotes to make it text, as in '\"{value}\"'.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # invalid bytes of the command line arrive as lone surrogates
        raise InputError(f"{name} is not UTF-8: {error}.") from error
    return value


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """[1, T] int64: the token that begins a document, if the tokenizer has one, followed by the tokens of the prompt.

    Raises: InputError for an empty prompt if no token begins a document, because there is nothing to continue.
    """
    start = document_start(tokenizer)
    tokens = [*([] if start is None else [start]), *encode_text(tokenizer, prompt)]
    if not tokens:
        raise InputError("the prompt is empty, and the tokenizer has no token that begins a document: give a prompt.")
    return torch.tensor([tokens])


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, yielded in pieces as soon as their characters are complete. Special tokens are skipped.

    A character of several bytes may span several tokens. It is yielded with the last of them. An incomplete character
    at the end is yielded as U+FFFD.
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
