"""Between text and tokens, for prompts and for a stream of drawn tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """[1, T]: the token that begins every document, then the prompt."""
    return torch.tensor([[tokenizer.token_to_id(END_OF_TEXT), *tokenizer.encode(prompt).ids]])


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece as it is complete, up to the end of the document.

    A character of several bytes may span tokens: its piece comes with its last one. What a last, incomplete character
    left behind comes as U+FFFD.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = DecodeStream(skip_special_tokens=True)
    drawn: list[int] = []
    shown = ""
    for token in tokens:
        if token == end:
            break
        drawn.append(token)
        piece = stream.step(tokenizer, token)
        if piece:
            shown += piece
            yield piece
    rest = tokenizer.decode(drawn)[len(shown) :]
    if rest:
        yield rest
