"""Packs a sequence of tokens into batches of fixed shape.

A row is `context` consecutive tokens. Its targets are the same tokens shifted by one position. A batch is the
concatenation of its rows, [1, N]. cu_seqlens holds the positions where sequences begin, which are the beginnings of
rows and of documents. It is padded to a fixed length by repeating its last value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lkda.data.shuffle import shuffled
from lkda.targets import IGNORE_INDEX


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


def cu_seqlens_length(parts: Sequence[Rows], *, batch_size: int) -> int:
    """A length of cu_seqlens that is enough for every batch of every split, so that all batches have one shape."""
    return 1 + batch_size * max(rows.most_sequences for rows in parts)


def pack(rows: Rows, numbers: Sequence[int], length: int) -> dict[str, Tensor]:
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
    """An unlimited sequence of batches, epoch after epoch. Only (seed, epoch) decides the order of the rows.

    Args:
        batch_size: rows per batch on this rank.
        cu_seqlens_length: see the function of that name.
        rank, world_size: of the data-parallel processes. They divide the rows of a step among themselves.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, cu_seqlens_length: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.rows, self.batch_size, self.cu_seqlens_length, self.seed = rows, batch_size, cu_seqlens_length, seed
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        places = (batch * self.batch_size + np.arange(self.batch_size)) * self.world_size + self.rank
        numbers = shuffled(places, self.rows.count, seed=self.seed)
        return pack(self.rows, numbers.tolist(), self.cu_seqlens_length)


class ValidationBatches(Dataset[dict[str, Tensor]]):
    """All rows once, in order. The last batch is filled with empty rows. With a limit, only the first `limit`
    batches."""

    def __init__(self, rows: Rows, *, batch_size: int, cu_seqlens_length: int, limit: int | None = None) -> None:
        self.rows, self.batch_size, self.cu_seqlens_length, self.limit = rows, batch_size, cu_seqlens_length, limit

    def __len__(self) -> int:
        batches = -(-self.rows.count // self.batch_size)
        return batches if self.limit is None else min(batches, self.limit)

    def __getitem__(self, batch: int) -> dict[str, Tensor]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        numbers = range(batch * self.batch_size, (batch + 1) * self.batch_size)
        return pack(self.rows, numbers, self.cu_seqlens_length)
