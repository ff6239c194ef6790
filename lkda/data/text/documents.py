"""The documents of a corpus, read from disk in parts, so that a large corpus need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 256
_BLOCK = 2**22  # characters of a long text that are read at a time


@dataclass(frozen=True)
class LongText:
    """A document that is too long for the memory: characters `begin` to `end` of a text file.

    Attributes:
        end: None means the end of the file.
    """

    path: Path
    begin: int = 0
    end: int | None = None

    def blocks(self) -> Iterator[str]:
        """The text in blocks that follow each other."""
        place = 0
        with open(self.path, encoding="utf-8") as file:
            while block := file.read(_BLOCK):
                low, high = max(self.begin - place, 0), None if self.end is None else self.end - place
                if high is not None and high <= 0:
                    return
                if low < len(block):
                    yield block[low:high]
                place += len(block)


# A document, and documents that can be iterated more than once.
Text = str | LongText
Texts = Collection[Text]


def blocks_of(document: Text) -> Iterator[str]:
    """The text of a document in blocks that follow each other."""
    return iter((document,)) if isinstance(document, str) else document.blocks()


def part_of(document: Text, begin: int, end: int) -> Text:
    """Characters `begin` to `end` of a whole document."""
    return document[begin:end] if isinstance(document, str) else LongText(document.path, begin, end)


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

    def __init__(self, table: Any, column: str, rows: Sequence[int] | np.ndarray | None = None) -> None:
        self.table, self.column = table.select_columns([column]), column
        found = (n for n, text in enumerate(self._texts(self.table)) if text.strip()) if rows is None else rows
        self.rows = np.fromiter(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return self._texts(self.table.select(self.rows))

    def __contains__(self, text: object) -> bool:
        return any(text == own for own in self)

    def some(self, numbers: np.ndarray) -> Documents:
        """The documents with these numbers, in ascending order."""
        return Documents(self.table, self.column, self.rows[numbers])

    def _texts(self, table: Any) -> Iterator[str]:
        for begin in range(0, len(table), _ROWS_AT_ONCE):
            for text in table[begin : begin + _ROWS_AT_ONCE][self.column]:
                yield text or ""


class TextFiles:
    """Text files, each of which is a document, read from disk at every iteration. A long one is read in blocks."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Text]:
        for path in self.paths:
            yield LongText(path) if path.stat().st_size > _BLOCK else path.read_text(encoding="utf-8")

    def __contains__(self, text: object) -> bool:
        return any(text == own for own in self)

    def some(self, numbers: np.ndarray) -> TextFiles:
        """The documents with these numbers."""
        return TextFiles([self.paths[n] for n in numbers.tolist()])


class TextLines:
    """Texts in a file, one JSON line each, read from the file at every iteration.

    Args:
        path: the file.
        count: the number of texts in it.
    """

    def __init__(self, path: Path, *, count: int = 0) -> None:
        self.path, self.count = path, count

    def emptied(self) -> TextLines:
        """The same without texts. The file is created, or emptied if it exists."""
        self.path.write_bytes(b"")
        return TextLines(self.path)

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
