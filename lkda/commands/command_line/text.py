"""Checks of texts that the command line gives."""

from __future__ import annotations

from lkda.checks import InputError
from lkda.generation.text import check_unicode, encode_prompt, text_pieces

__all__ = ["check_text", "encode_prompt", "text_pieces"]


def check_text(name: str, value: object) -> str:
    """Return `value`. Raises InputError, naming the setting, unless it is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got {value!r}; add quotes to make it text, as in '\"{value}\"'.")
    check_unicode(name, value)  # invalid bytes of the command line arrive as lone surrogates
    return value
