"""Loss by position in the context: what more of the text before a token is worth to a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.ops.sequences import positions
from lkda.special_tokens import IGNORE_INDEX


def starts(context: int) -> list[int]:
    """First positions of the ranges 0, 1, 2-3, 4-7, ... of a context."""
    return [0, *(1 << n for n in range((context - 1).bit_length()))]


def columns(context: int, *, split: str = "val") -> list[str]:
    """The columns of metrics.csv that `PositionLoss` fills: val/loss/from_0, val/loss/from_1, val/loss/from_2, ..., and
    for the split "test" those of the test split."""
    return [f"{split}/loss/from_{start}" for start in starts(context)]


class PositionLoss(nn.Module):
    """The mean loss in nats over the targets of each range of positions, a position counted from its sequence's start.

    Args:
        context: tokens of a sequence, at most.
        split: the beginning of the columns.
    """

    starts: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, context: int, *, split: str = "val") -> None:
        super().__init__()
        self.columns = columns(context, split=split)
        self.register_buffer("starts", torch.tensor(starts(context)), persistent=False)
        self.reset()

    def reset(self) -> None:
        for name in ("sums", "counts"):
            self.register_buffer(name, torch.zeros(len(self.columns), device=self.starts.device), persistent=False)

    def update(self, losses: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> None:
        """Take in the losses [B, T] of targets [B, T]; those of IGNORE_INDEX do not count."""
        T = targets.shape[1]
        where = torch.arange(T, device=targets.device) if cu_seqlens is None else positions(cu_seqlens, T)[0]
        ranges = torch.searchsorted(self.starts, where, right=True) - 1
        counted = targets != IGNORE_INDEX
        for n in range(len(self.columns)):
            chosen = counted & (ranges == n)
            self.sums[n] += (losses * chosen).sum()
            self.counts[n] += chosen.sum()

    def compute(self) -> dict[str, Tensor]:
        """By column of metrics.csv, of the ranges that were seen; resets."""
        found = {name: self.sums[n] / self.counts[n] for n, name in enumerate(self.columns) if self.counts[n] > 0}
        self.reset()
        return found
