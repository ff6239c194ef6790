"""Reads metrics.csv, the rows that a run records while it trains."""

from __future__ import annotations

import csv
from pathlib import Path

from lkda.checks import InputError
from lkda.records import read_record

# A run of a million steps with a row for each has 200 MB, and 30 million values.
MOST_BYTES, MOST_VALUES = 2**30, 2**27


def metrics_rows(text: str) -> list[dict[str, str]]:
    """The rows of a metrics.csv, in order: text by column, "" if a row has no value.

    A killed process may have left an incomplete last line. Only a line that ends in a newline is a row.

    Raises: InputError if the rows are too many for the memory; csv.Error if they are no CSV.
    """
    lines = text.split("\n")[:-1]
    if lines and len(lines) * (1 + lines[0].count(",")) > MOST_VALUES:
        raise InputError(f"metrics.csv has {len(lines):,} rows, more values than the {MOST_VALUES:,} that are read.")
    return list(csv.DictReader(lines))


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of the file at `path`, or an empty list if there is no file. Raises: ValueError if it is damaged."""
    if not path.exists():
        return []
    try:
        rows = metrics_rows(read_record(path, most=MOST_BYTES))
        for row in rows:
            int(row["step"])
    except InputError:
        raise
    except (UnicodeDecodeError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: not each of its rows is of one step of a run. Put it back, or move it away."
        ) from error
    return rows
