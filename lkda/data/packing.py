"""Packs a sequence of tokens into batches of fixed shape.

A row is `context` consecutive tokens. Its targets are the same tokens shifted by one position. A batch is the
concatenation of its rows, [1, N]. cu_seqlens holds the positions where sequences begin, which are the beginnings of
rows and of documents. It is padded to a fixed length by repeating its last value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lkda.data.shuffle import shuffled, weighted
from lkda.targets import IGNORE_INDEX


class RowSource(Protocol):
    """Rows of `context` tokens that are read by number.

    Attributes:
        context: tokens per row.
        count: the number of rows.
        most_sequences: the largest number of sequences in a row.
    """

    context: int
    count: int
    most_sequences: int

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and targets of row n, both [context] int64. A row past the end is padding without targets."""

    def begins(self, n: int) -> np.ndarray:
        """The positions in row n where a sequence begins, from 0 on, in ascending order."""


class Rows:
    """The rows of a sequence of tokens.

    Args:
        token_ids: [N], whole numbers.
        starts: positions in it where documents begin, in ascending order.
        context: tokens per row.
        partial: whether the last tokens, if they are fewer than a row, make a row too. The rest of that row is padding
            without targets.
    """

    def __init__(self, token_ids: np.ndarray, *, starts: np.ndarray, context: int, partial: bool) -> None:
        self.token_ids, self.starts, self.context = token_ids, starts, context
        targets = max(0, len(token_ids) - 1)
        self.count = -(-targets // context) if partial else targets // context
        # Sequences per row: one, and one more for each document that begins inside the row.
        inside = starts[(starts % context != 0) & (starts < self.count * context)] // context
        self.most_sequences = 1 + int(np.bincount(inside).max(initial=0))

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and targets of row n, both [context] int64. A row past the end is padding without targets."""
        tokens = np.full(self.context + 1, self.token_ids[0], dtype=np.int64)
        piece = self.token_ids[n * self.context : (n + 1) * self.context + 1] if n < self.count else self.token_ids[:0]
        tokens[: len(piece)] = piece
        targets = tokens[1:].copy()
        targets[max(0, len(piece) - 1) :] = IGNORE_INDEX
        return tokens[:-1], targets

    def begins(self, n: int) -> np.ndarray:
        """The positions in row n where a sequence begins: its first token, and the first token of each document. The
        last token does not count, because nothing is predicted after it."""
        first = n * self.context
        end = min(first + self.context, len(self.token_ids) - 1)
        low, high = np.searchsorted(self.starts, [first + 1, end])
        return np.concatenate([[0], self.starts[low:high] - first])


class JoinedRows:
    """The rows of several sources, one after another, none of which crosses from one source to the next.

    Args:
        parts: with the same context.
    """

    def __init__(self, parts: Sequence[RowSource]) -> None:
        self.parts, self.context = parts, parts[0].context
        self.ends = np.cumsum([part.count for part in parts])
        self.count = int(self.ends[-1])
        self.most_sequences = max(part.most_sequences for part in parts)

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        part, own = self._place(n)
        return part.row(own)

    def begins(self, n: int) -> np.ndarray:
        part, own = self._place(n)
        return part.begins(own)

    def _place(self, n: int) -> tuple[RowSource, int]:
        """The source of row n, and the row's number in it."""
        index = min(int(np.searchsorted(self.ends, n, side="right")), len(self.parts) - 1)
        return self.parts[index], n - int(self.ends[index] - self.parts[index].count)


def cu_seqlens_length(parts: Sequence[RowSource], *, batch_size: int) -> int:
    """A length of cu_seqlens that is enough for every batch of every split, so that all batches have one shape."""
    return 1 + batch_size * max(rows.most_sequences for rows in parts)


def pack(rows: RowSource, numbers: Sequence[int], length: int) -> dict[str, Tensor]:
    """A batch of the rows with these numbers: tokens and targets [1, N] int64, cu_seqlens [length] int32."""
    pairs = [rows.row(n) for n in numbers]
    tokens = np.concatenate([pair[0] for pair in pairs])
    targets = np.concatenate([pair[1] for pair in pairs])
    starts = np.concatenate([place * rows.context + rows.begins(n) for place, n in enumerate(numbers)])
    bounds = np.full(length, len(tokens), dtype=np.int32)
    bounds[: len(starts)] = starts
    return {
        "tokens": torch.from_numpy(tokens).unsqueeze(0),
        "targets": torch.from_numpy(targets).unsqueeze(0),
        "cu_seqlens": torch.from_numpy(bounds),
    }


class TrainingBatches(Dataset[dict[str, Tensor]]):
    """An unlimited sequence of batches. Their rows are numbered by their places in the unlimited sequence of all
    rows, and only the seed and the place decide which row that is.

    Args:
        batch_size: rows per batch on this rank.
        cu_seqlens_length: see the function of that name.
        rank, world_size: of the data-parallel processes. They divide the rows of a step among themselves: together
            they have the rows of one process with a `world_size` times as large batch.
        parts: for `JoinedRows`, the number of rows of each source, and its weight; see `weighted`. None means that all
            rows follow each other, epoch after epoch.
    """

    def __init__(
        self,
        rows: RowSource,
        *,
        batch_size: int,
        cu_seqlens_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        parts: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.rows, self.batch_size, self.cu_seqlens_length, self.seed = rows, batch_size, cu_seqlens_length, seed
        self.rank, self.world_size, self.parts = rank, world_size, parts

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        places = (batch * self.batch_size + np.arange(self.batch_size)) * self.world_size + self.rank
        if self.parts is None:
            numbers = shuffled(places, self.rows.count, seed=self.seed)
        else:
            numbers = weighted(places, self.parts, seed=self.seed)
        return pack(self.rows, numbers.tolist(), self.cu_seqlens_length)


class ValidationBatches(Dataset[dict[str, Tensor]]):
    """All rows once, in order. The last batch is filled with empty rows. With a limit, only the first `limit`
    batches."""

    def __init__(self, rows: RowSource, *, batch_size: int, cu_seqlens_length: int, limit: int | None = None) -> None:
        self.rows, self.batch_size, self.cu_seqlens_length, self.limit = rows, batch_size, cu_seqlens_length, limit

    def __len__(self) -> int:
        batches = -(-self.rows.count // self.batch_size)
        return batches if self.limit is None else min(batches, self.limit)

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        numbers = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return pack(self.rows, numbers, self.cu_seqlens_length)
