"""Reads metrics.csv, the rows that a run records while it trains."""

from __future__ import annotations

import csv
from pathlib import Path


def metrics_rows(text: str) -> list[dict[str, str]]:
    """The rows of a metrics.csv, in order: text by column, "" if a row has no value.

    A killed process may have left an incomplete last line. Only a line that ends in a newline is a row.
    """
    return list(csv.DictReader(text.split("\n")[:-1]))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of the file at `path`, or an empty list if there is no file."""
    return metrics_rows(path.read_text(encoding="utf-8")) if path.exists() else []
