"""Reads metrics.csv, the rows that a run records while it trains."""

from __future__ import annotations

import csv
from pathlib import Path

from lkda.checks import InputError


def metrics_rows(text: str) -> list[dict[str, str]]:
    """The rows of a metrics.csv, in order: text by column, "" if a row has no value.

    A killed process may have left an incomplete last line. Only a line that ends in a newline is a row.
    """
    return list(csv.DictReader(text.split("\n")[:-1]))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of the file at `path`, or an empty list if there is no file. Raises: ValueError if it is damaged."""
    if not path.exists():
        return []
    try:
        rows = metrics_rows(path.read_text(encoding="utf-8"))
        for row in rows:
            int(row["step"])
    except (UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: not each of its rows is of one step of a run. Put it back, or move it away."
        ) from error
    return rows
