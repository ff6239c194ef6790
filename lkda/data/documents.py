"""The documents of a corpus, as many at a time in memory as are looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

# Texts that can be iterated again.
Texts = Collection[str]
_ROWS_AT_ONCE = 256


class Documents:
    """The texts of a column of a `datasets.Dataset`, read from its file whenever they are iterated.

    Args:
        table: the data set.
        column: of text.
        rows: which ones, in that order; where None, all that hold more than white space.
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
        """Those of these numbers."""
        return Documents(self.table, self.column, [self.rows[n] for n in numbers])

    def _texts(self, table: Any) -> Iterator[str]:
        for begin in range(0, len(table), _ROWS_AT_ONCE):
            for text in table[begin : begin + _ROWS_AT_ONCE][self.column]:
                yield text or ""
