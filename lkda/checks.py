"""Errors of whoever calls: what was expected, what came, and what to do, before any time is spent."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

# A number above it is a slip of the keyboard, and stops no library below at once.
MOST = 2**31 - 1


class InputError(ValueError):
    """A value that the caller gave does not do; the message is written for them."""


def check_count(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Raises InputError for what is no whole number of `least` or more, or is above `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}.")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, got {value!r}.")


def check_types(function: Callable[..., Any], given: Mapping[str, object], *, prefix: str) -> None:
    """Raises InputError for an argument in `given` whose value is not of the type that `function` declares.

    Args:
        function: or class.
        prefix: of the names in the message, "data." for data.context.
    """
    target = function.__init__ if inspect.isclass(function) else function
    check_values(given, typing.get_type_hints(target), prefix=prefix)


def check_values(given: Mapping[str, object], declared: Mapping[str, Any], *, prefix: str = "") -> None:
    """Raises InputError for a value in `given` that is not of its type in `declared`.

    Numbers are finite, and whole ones at most MOST; a Path is a string that is not empty. What is declared in other
    words than these, bool, str, None, unions, sequences and mappings of them is not looked at.
    """
    for name, value in given.items():
        if name in declared and not _fits(value, declared[name]):
            raise InputError(f"{prefix}{name} must be {_in_words(declared[name])}, got {value!r}.")


def _fits(value: object, declared: Any) -> bool:
    origin, parts = typing.get_origin(declared), typing.get_args(declared)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if declared in (None, type(None)):
        return value is None
    if declared is bool:
        return isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if declared is Path:
        return isinstance(value, str) and value != ""
    if declared is str:
        return isinstance(value, str)
    if origin is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(_fits(item, parts[0]) for item in value)  # type: ignore[attr-defined]
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, parts[1]) for item in value.values())
    return True


def _in_words(declared: Any) -> str:
    origin, parts = typing.get_origin(declared), typing.get_args(declared)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin is Sequence:
        return f"a list, each entry {_in_words(parts[0])}"
    if origin is Mapping:
        return f"names with values, each {_in_words(parts[1])}"
    words: dict[Any, str] = {Path: "a path (one of digits alone needs quotes)"}
    words |= {bool: "true or false", int: f"a whole number (at most {MOST})", float: "a finite number", str: "text"}
    return words.get(declared, "null")
