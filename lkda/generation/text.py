"""Converts prompts to tokens, and sampled tokens to text that ends at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lkda.checks import InputError
from lkda.data.text.tokenizer import decode_tokens, document_start, encode_text

WORD = "a"
# What decoders write for bytes that are no character, or only the beginning of one.
REPLACEMENT = "\ufffd"


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, name: str = "the prompt") -> Tensor:
    """[1, T] int64: the token that begins a document, if the tokenizer has one, followed by the tokens of the prompt.

    Args:
        name: of the prompt, for the message.
    Raises: InputError for text that UTF-8 cannot encode, and for an empty prompt if no token begins a document, because
        there is nothing to continue.
    """
    check_unicode(name, prompt)
    start = document_start(tokenizer)
    tokens = [*([] if start is None else [start]), *encode_text(tokenizer, prompt)]
    if not tokens:
        found = f"the tokenizer knows no character of {name}" if prompt else f"{name} is empty"
        raise InputError(f"{found}, and the tokenizer has no token that begins a document: give another prompt.")
    return torch.tensor([tokens])


def check_model(model: object) -> None:
    """Raises InputError unless it is a language model, or a module with one inside, that has its weights."""
    weight = getattr(getattr(model, "embed_tokens", None), "weight", None)
    if not isinstance(weight, torch.Tensor) or not hasattr(model, "init_state"):
        raise InputError(
            f"model must be a model of lkda, as lkda.load returns, got {type(model).__name__}: call "
            "model, tokenizer = lkda.load(PATH)."
        )
    if weight.is_meta:
        raise InputError("the model has no weights: it is on the device meta. Load it with lkda.load(PATH).")


def check_tokenizer(tokenizer: object) -> None:
    """Raises InputError unless it is a tokenizer of the package tokenizers."""
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"tokenizer must be a tokenizers.Tokenizer, as lkda.load returns, got {type(tokenizer).__name__}; a fast "
            "tokenizer of transformers has one as backend_tokenizer."
        )


def check_unicode(name: str, text: str) -> None:
    """Raises InputError, naming the text, if UTF-8 cannot encode it because it has a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not UTF-8: {error}.") from error


def text_pieces(tokenizer: Tokenizer, tokens: Iterable[int], *, continues: bool = False) -> Iterator[str]:
    """The text of `tokens`, yielded in pieces as soon as their characters are complete, as `GrowingText` has it."""
    text = GrowingText(tokenizer, continues=continues)
    for token in tokens:
        piece = text.add(token)
        if piece:
            yield piece
    rest = text.finish()
    if rest:
        yield rest


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings. Raises ValueError for anything but text that is not empty, or a list of such texts."""
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(text, str) and text for text in strings):
        raise InputError(f"stop must be a text that is not empty, or a list of such texts, got {stop!r}.")
    return tuple(strings)


class GrowingText:
    """The text of tokens that come one by one. Special tokens are skipped.

    A character of several bytes may span several tokens. It is returned with the last of them. What may be the
    beginning of a stop string is held back until it is known whether it is. The text ends at the stop string that is
    complete first, wherever the borders of tokens are; of several that end there, at the longest.

    Args:
        stop: strings that end the text. They are not part of it.
        continues: whether another text stands before it. The decoders of some tokenizers (those of SentencePiece) drop
            the space before the first word of what they decode.

    Attributes:
        tokens: all tokens, those of a stop string included.
        text: the text so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._held = ""
        # What is decoded before the text; a word of any text does.
        self._before = encode_text(tokenizer, WORD) if continues else []
        # New tokens are decoded together with those of the last piece: the first `_count` of `_window`, whose text is
        # `_returned`. `_length` is the number of characters so far, with those before the text.
        self._window, self._count = list(self._before), len(self._before)
        self._returned = self._decoded(self._before)
        self._length = len(self._returned)

    def add(self, token: int) -> str:
        """The text that is new with this token; it may be empty."""
        self.tokens.append(token)
        return self._found(self._characters(token))

    def _characters(self, token: int) -> str:
        """The characters that the token completes.

        `tokenizers.decoders.DecodeStream` does the same, but fails where a decoder changes what it has returned, which
        one of SentencePiece does after bytes that are no character.
        """
        self._window.append(token)
        text = self._decoded(self._window)
        if len(text) <= len(self._returned) or text.endswith(REPLACEMENT):
            return ""
        new = text[len(self._returned) :]
        self._length += len(new)
        self._window = self._window[self._count :]
        self._returned, self._count = self._decoded(self._window), len(self._window)
        return new

    def _decoded(self, tokens: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, tokens)

    def finish(self) -> str:
        """The rest of the text. An incomplete character at the end is U+FFFD."""
        if self.stopped:
            return ""
        new = self._found(self._decoded([*self._before, *self.tokens])[self._length :])
        if not self.stopped:
            self.text += self._held
            new, self._held = new + self._held, ""
        return new

    def _found(self, piece: str) -> str:
        self._held += piece
        found = [(place + len(stop), place) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped, (_, keep) = True, min(found)
            new, self._held = self._held[:keep], ""
        else:
            keep = len(self._held) - self._possible_stop()
            new, self._held = self._held[:keep], self._held[keep:]
        self.text += new
        return new

    def _possible_stop(self) -> int:
        """The number of characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
