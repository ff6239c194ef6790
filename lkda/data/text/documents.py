"""The documents of a corpus, read from disk in parts, so that a large corpus need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Texts that can be iterated more than once.
Texts = Collection[str]
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Splits:
    """The documents of a corpus. Each document is in exactly one split.

    Attributes:
        train: the documents to train on.
        validation: the documents on which settings and learning rates are compared and chosen.
        test: the documents of the reported results. Empty if there is no test split.
    """

    train: Texts
    validation: Texts
    test: Texts = ()


class Documents:
    """The texts of a column of a `datasets.Dataset`, read from its file at every iteration.

    Args:
        table: the data set.
        column: the column that holds the text.
        rows: the numbers of the rows, in order. None means all rows with more than white space.
    """

    def __init__(self, table: Any, column: str, rows: Sequence[int] | None = None) -> None:
        self.table, self.column = table.select_columns([column]), column
        self.rows = (
            [n for n, text in enumerate(self._texts(self.table)) if text.strip()] if rows is None else list(rows)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return self._texts(self.table.select(self.rows))

    def __contains__(self, text: object) -> bool:
        return any(text == own for own in self)

    def some(self, numbers: Sequence[int]) -> Documents:
        """The documents with these numbers."""
        return Documents(self.table, self.column, [self.rows[n] for n in numbers])

    def _texts(self, table: Any) -> Iterator[str]:
        for begin in range(0, len(table), _ROWS_AT_ONCE):
            for text in table[begin : begin + _ROWS_AT_ONCE][self.column]:
                yield text or ""


class TextLines:
    """Texts in a file, one JSON line each, read from the file at every iteration.

    Args:
        path: the file. It is created, or emptied if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        path.write_bytes(b"")

    def append(self, texts: Sequence[str]) -> None:
        """Append texts to the file."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(text) + "\n" for text in texts)
        self.count += len(texts)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def __contains__(self, text: object) -> bool:
        return any(text == own for own in self)
