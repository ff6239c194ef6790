"""Loads tokenizers from text that may be damaged or made by a stranger, and turns their failures into errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.records import check_record
from lkda.tokenizer_growth import LARGEST_GROWTH, growths

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def tokenizer_from_file(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without truncation and padding. Raises: InputError if it cannot be used."""
    check_record(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a tokenizer.json ({error}).") from error
    return tokenizer_from_text(text, problem=f"{path} is not a tokenizer.json")


def tokenizer_from_text(text: str, *, problem: str) -> Tokenizer:
    """The tokenizer that JSON describes, without truncation and padding.

    Args:
        problem: the beginning of the message for text that is none, as "tokens.json is not a tokenizer.json".
    Raises: InputError if it is none, or if it could make a text more than LARGEST_GROWTH times longer.
    """
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            # Before the vocabulary is loaded, because added tokens are normalized then.
            bare = {**_EMPTY, **{name: content.get(name) for name in _PARTS}}
            _check_growth(Tokenizer.from_str(json.dumps(bare)), problem)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_growth(tokenizer, problem)  # the library may have read repeated entries in another way
    except InputError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise InputError(f"{problem} ({_on_one_line(error)}).") from error
    return tokenizer


@contextmanager
def refusing_panics() -> Iterator[None]:
    """Within it, a panic of the library `tokenizers`, which is no Exception, becomes an InputError of one line."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise InputError(
            f"the tokenizer failed on a text ({_on_one_line(error)}): expected regular expressions and steps in its "
            "tokenizer.json that the library tokenizers can run on every text. Use another tokenizer.json."
        ) from error


def _is_panic(error: BaseException) -> bool:
    """PyO3 derives the error of a panic in Rust from BaseException, and no module exports it."""
    return type(error).__name__ == "PanicException"


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _check_growth(tokenizer: Tokenizer, problem: str) -> None:
    for name, growth in growths(tokenizer).items():
        if growth > LARGEST_GROWTH:
            raise InputError(
                f"{problem} that can be used: in {name}, it could make a text {growth:,.0f} times longer (the product "
                f"of its steps, such as Replace and Prepend), expected at most {LARGEST_GROWTH:,} times. "
                "Use a tokenizer.json whose steps lengthen text less."
            )
