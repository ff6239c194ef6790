"""Checks of the caller's values. A message says what was expected, what came and what to do, before time is spent."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

# A larger whole number is taken for a typing mistake. The libraries below would not reject it at once.
MOST = 2**31 - 1


class InputError(ValueError):
    """The caller gave a value that cannot be used. The message is written for the caller."""


class PlainWarning(UserWarning):
    """A warning whose message is written for the caller. Commands print only the message, on one line."""


@contextmanager
def refusing_damage(source: object) -> Iterator[None]:
    """Within it, what Python and the libraries raise for values of a wrong kind becomes an InputError of one line.

    For code that uses values from a file that may be damaged or made by a stranger, where each value can be anything.

    Args:
        source: the file or directory, for the message.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise InputError(
            f"{source} is damaged: it holds a value of a wrong kind ({type(error).__name__}: {text})."
        ) from error


def check_count(name: str, value: object, *, least: int, most: int | None = None) -> None:
    """Raises InputError unless `value` is a whole number from `least` to `most` (no upper limit if None)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number of {least} or more, got {value!r}.")
    if most is not None and value > most:
        raise InputError(f"{name} must be at most {most}, got {value!r}.")


def check_distinct(name: str, values: Sequence[object]) -> None:
    """Raises InputError if a value occurs twice in a list in which each must be another."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise InputError(f"{name} has {value} twice: leave one of them out.")


def check_types(function: Callable[..., Any], given: Mapping[str, object], *, prefix: str) -> None:
    """Raises InputError for an argument in `given` whose value is not of the type that `function` declares.

    Args:
        function: a function, or a class, whose constructor is checked.
        prefix: put before the names in the message, such as "data." for data.context.
    """
    target = function.__init__ if inspect.isclass(function) else function
    check_values(given, typing.get_type_hints(target), prefix=prefix)


def check_values(given: Mapping[str, object], declared: Mapping[str, Any], *, prefix: str = "") -> None:
    """Raises InputError for a value in `given` that is not of its type in `declared`.

    A number must be finite, and a whole number at most MOST. A value declared as a Path must be a string that is not
    empty. Other types that are understood are bool, str, None, and unions, sequences and mappings of all these. A value
    of any other declared type is not checked.
    """
    for name, value in given.items():
        if name in declared and not _fits(value, declared[name]):
            in_brackets = isinstance(value, str) and value != "" and _fits([value], declared[name])
            advice = f": put it into brackets, {prefix}{name}='[{value}]'" if in_brackets else ""
            raise InputError(f"{prefix}{name} must be {_in_words(declared[name])}, got {value!r}{advice}.")


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
        return f"names with values as in {{name: value}}, each value {_in_words(parts[1])}"
    words: dict[Any, str] = {Path: "a path (quote it if it is a number)"}
    words |= {bool: "true or false", int: f"a whole number (at most {MOST})", float: "a finite number", str: "text"}
    return words.get(declared, "null")
