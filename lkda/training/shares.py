"""Divides a batch among the processes of a run: its sequences, and with context parallelism their tokens too.

Every process makes the whole batch, whose content depends only on its number, and takes its share. A step therefore has
the same sequences for every number of processes, and a run may be resumed with another number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lkda.targets import IGNORE_INDEX

Batch = Mapping[str, Any]


def share_of(*, rank: int, count: int, rows: int) -> Callable[[Batch], dict[str, Any]]:
    """The function that takes the share of one of `count` processes from a batch: every `count`-th sequence.

    A packed batch has `rows` rows of equal length in its tokens [1, N], and a cu_seqlens of length 1 + rows * s, where
    s is the largest number of sequences in a row. Any other batch has tokens [B, T] with a row for each sequence. If
    its rows are too few for all processes to have equally many, some get another row that has no targets.

    Args:
        rank: of the process among those that train on different sequences.
        rows: rows of a packed batch, a multiple of `count`.
    """
    if rows % count:
        raise ValueError(f"{rows} rows cannot be divided among {count} processes")

    def share(batch: Batch) -> dict[str, Any]:
        if batch.get("cu_seqlens") is None:
            return _rows_of(batch, rank, count)
        return _packed_rows_of(batch, rank, count, rows)

    return share


def _rows_of(batch: Batch, rank: int, count: int) -> dict[str, Any]:
    tokens, targets = batch["tokens"], batch["targets"]
    each = -(-len(tokens) // count)
    numbers = torch.arange(each) * count + rank
    missing = numbers >= len(tokens)
    numbers[missing] = 0
    tokens, targets = tokens[numbers], targets[numbers]
    targets[missing] = IGNORE_INDEX
    found = {**batch, "tokens": tokens, "targets": targets}
    if batch.get("target_positions") is not None:
        found["target_positions"] = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    return found


def _packed_rows_of(batch: Batch, rank: int, count: int, rows: int) -> dict[str, Any]:
    chosen = slice(rank, None, count)
    tokens, targets = (batch[name].view(rows, -1)[chosen].reshape(1, -1) for name in ("tokens", "targets"))
    length = 1 + (len(batch["cu_seqlens"]) - 1) // count
    bounds = _bounds_of_rows(batch["cu_seqlens"], range(rows)[chosen], batch["tokens"].shape[1] // rows)
    assert len(bounds) <= length
    cu_seqlens = torch.full((length,), tokens.shape[1], dtype=batch["cu_seqlens"].dtype)
    cu_seqlens[: len(bounds)] = bounds
    return {**batch, "tokens": tokens, "targets": targets, "cu_seqlens": cu_seqlens}


def _bounds_of_rows(cu_seqlens: Tensor, rows: range, length: int) -> Tensor:
    """Where the sequences of these rows begin, if the rows are laid side by side."""
    starts = cu_seqlens[:-1]
    row, within = starts // length, starts % length
    inside = (row < rows.stop) & (row % rows.step == rows.start) & (starts < cu_seqlens[-1])
    return torch.unique(row[inside] // rows.step * length + within[inside]).to(cu_seqlens.dtype)


def part_of(*, number: int, count: int, rows: int) -> Callable[[Batch], dict[str, Any]]:
    """The function that takes one of `count` consecutive parts from each row of a batch.

    The part has further entries, for `SequencePart`: "before" [R], and for a packed batch "documents".

    Args:
        number: the number of the part.
        rows: rows of a packed batch.
    """

    def part(batch: Batch) -> dict[str, Any]:
        packed = batch.get("cu_seqlens") is not None
        whole = {name: batch[name].view(rows if packed else len(batch[name]), -1) for name in ("tokens", "targets")}
        R, T = whole["tokens"].shape
        if T % count:
            raise ValueError(f"{T} tokens cannot be divided among {count} processes")
        begin, end = number * T // count, (number + 1) * T // count
        found = {**batch, **{name: x[:, begin:end].contiguous() for name, x in whole.items()}}
        if not packed:
            return found | {"before": torch.full((R,), begin)}
        return found | _packed_part(found, batch["cu_seqlens"], begin, end, T)

    return part


def _packed_part(found: dict[str, Any], cu_seqlens: Tensor, begin: int, end: int, T: int) -> dict[str, Any]:
    R, length = found["tokens"].shape[0], end - begin
    token = torch.arange(R * T)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    position = (token - cu_seqlens[sequence].long()).view(R, T)
    starts = (position[:, begin:end] == 0) | (torch.arange(length) == 0)
    bounds = starts.flatten().nonzero().squeeze(1).to(cu_seqlens.dtype)
    padded = torch.full_like(cu_seqlens, R * length)
    padded[: len(bounds)] = bounds
    return {
        "tokens": found["tokens"].reshape(1, -1),
        "targets": found["targets"].reshape(1, -1),
        "cu_seqlens": padded,
        "before": position[:, begin].contiguous(),
        "documents": sequence.view(R, T)[:, :end].contiguous(),
    }
