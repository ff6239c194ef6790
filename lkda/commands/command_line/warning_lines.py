"""Prints the warnings of lkda that are written for the user as one line, without the code that gave them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lkda.checks import PlainWarning


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within it, a PlainWarning is printed as `warning: ...`. The form of other warnings stays."""
    before = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, PlainWarning):
            return f"warning: {' '.join(str(message).split())}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before
