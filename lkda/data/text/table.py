"""Reads JSON lines and parquet files row by row, so that only a few rows are in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lkda.checks import InputError

_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Table:
    """The rows of files of JSON lines, or of parquet files.

    Attributes:
        paths: the files, of one kind.
        columns: the columns to read. Each must hold text or null.
        names: what to set if a column is missing, by column, such as {"text": "data.text_column"}.
        complete: whether every row must have all columns, though a value may be null.
    """

    paths: Sequence[Path]
    columns: Sequence[str]
    names: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def rows(self, numbers: np.ndarray | None = None) -> Iterator[tuple[str, ...]]:
        """The texts of the columns in each row, "" for null and where a row lacks the column.

        Args:
            numbers: the rows to give, in ascending order. None means all.
        Raises: InputError for a file that cannot be read, a column that does not hold text, one that no row has, or if
            `complete` one that any row lacks.
        """
        count = place = 0
        missing = set(self.columns)
        has: list[str] = []
        for path in self.paths:
            read = self._parquet if path.suffix.lower() == ".parquet" else self._json_lines
            for own, row in enumerate(read(path), 1):
                wanted = numbers is None or (place < len(numbers) and numbers[place] == count)
                if wanted:
                    values = row.values()
                    if missing:
                        missing, has = missing - values.keys(), has or list(values)
                    for column in self.columns if self.complete else ():
                        if column not in values:
                            raise self._no_column(f"row {own} of {path}", column, list(values))
                    yield tuple(self._text(values.get(column), column, path, own) for column in self.columns)
                    place += 1
                count += 1
                if numbers is not None and place == len(numbers):
                    return
        if numbers is None and count:
            for column in (column for column in self.columns if column in missing):
                raise self._no_column(self.paths[0], column, has)

    def _json_lines(self, path: Path) -> Iterator[_Row]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _Line(path, number, line)

    def _parquet(self, path: Path) -> Iterator[_Row]:
        import pyarrow
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            for column in self.columns:
                if column not in file.schema_arrow.names:
                    raise self._no_column(path, column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=list(self.columns)):
                yield from (_Given(row) for row in batch.to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"cannot read {path} as parquet: {' '.join(str(error).split())}") from error

    def _text(self, text: object, column: str, path: Path, number: int) -> str:
        if not isinstance(text, str | None):
            raise InputError(
                f"column {column!r} of {path} holds {kind_of_value(text)}, not text, in row {number}. Correct the "
                f"file, or set {self._option(column)}."
            )
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise InputError(f"column {column!r} of {path} is not UTF-8 in row {number}: {error}.") from error
        return text or ""

    def _no_column(self, what: str | Path, column: str, has: Sequence[str]) -> InputError:
        there = ", ".join(has) or "none"
        return InputError(f"{what} has no column {column!r}; it has {there}. Set {self._option(column)}.")

    def _option(self, column: str) -> str:
        return self.names.get(column, "data.text_column")


class _Row:
    """A row whose values are read when they are needed."""

    def values(self) -> dict[str, Any]:
        raise NotImplementedError


@dataclass(frozen=True)
class _Given(_Row):
    found: dict[str, Any]

    def values(self) -> dict[str, Any]:
        return self.found


@dataclass(frozen=True)
class _Line(_Row):
    path: Path
    number: int
    line: bytes

    def values(self) -> dict[str, Any]:
        try:
            row = json.loads(self.line)
        except (ValueError, RecursionError) as error:  # also a number of too many digits
            raise InputError(f"cannot read {self.path} as JSON lines: line {self.number}: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"cannot read {self.path} as JSON lines: line {self.number} is {kind_of_value(row)}.")
        return row


def kind_of_value(value: object) -> str:
    """The kind of a value that is not text, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list", str: "text"}
    return kinds.get(type(value), f"a {type(value).__name__}")


class TableTexts:
    """The documents in a column of a table, read from its files at every iteration.

    Args:
        rows: the numbers of the rows, in ascending order. None means all rows with more than white space.
    """

    def __init__(self, table: Table, rows: np.ndarray | None = None) -> None:
        self.table = table
        self.rows = (
            np.fromiter((n for n, (text,) in enumerate(table.rows()) if text.strip()), dtype=np.int64)
            if rows is None
            else rows
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (text for (text,) in self.table.rows(self.rows))

    def __contains__(self, text: object) -> bool:
        return any(text == own for own in self)

    def some(self, numbers: np.ndarray) -> TableTexts:
        """The documents with these numbers, in ascending order."""
        return TableTexts(self.table, self.rows[numbers])
