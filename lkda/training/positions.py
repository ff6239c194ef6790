"""Loss by position in the context. It shows how much a model gains from more preceding text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.models.sequence_part import SequencePart
from lkda.ops.sequences import positions
from lkda.targets import IGNORE_INDEX
from lkda.training.processes import sum_over_processes


def starts(context: int) -> list[int]:
    """The first positions of the ranges 0, 1, 2-3, 4-7, ... of a context of that many tokens."""
    return [0, *(1 << n for n in range((context - 1).bit_length()))]


def columns(context: int, *, split: str = "val") -> list[str]:
    """The columns of metrics.csv that `PositionLoss` fills: val/loss/from_0, val/loss/from_1, val/loss/from_2 and so
    on, or test/loss/from_0 and so on for the split "test"."""
    return [f"{split}/loss/from_{start}" for start in starts(context)]


class PositionLoss(nn.Module):
    """The mean loss in nats per token over the targets in each range of positions, counted from the sequence's start.

    Args:
        context: the largest number of tokens in a sequence.
        split: prefix of the column names, "val" or "test".

    Attributes:
        part: of the batch's rows, if several devices divide them.
    """

    starts: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, context: int, *, split: str = "val") -> None:
        super().__init__()
        self.columns = columns(context, split=split)
        self.part: SequencePart | None = None
        self.register_buffer("starts", torch.tensor(starts(context)), persistent=False)
        self.reset()

    def reset(self) -> None:
        for name in ("sums", "counts"):
            self.register_buffer(name, torch.zeros(len(self.columns), device=self.starts.device), persistent=False)

    def update(self, losses: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> None:
        """Add the losses [B, T] of the targets [B, T]. Targets of IGNORE_INDEX do not count."""
        T = targets.shape[1]
        where = torch.arange(T, device=targets.device) if cu_seqlens is None else positions(cu_seqlens, T)[0]
        if self.part is not None:
            where = self.part.positions(where)
        ranges = torch.searchsorted(self.starts, where, right=True) - 1
        counted = targets != IGNORE_INDEX
        for n in range(len(self.columns)):
            chosen = counted & (ranges == n)
            self.sums[n] += (losses * chosen).sum()
            self.counts[n] += chosen.sum()

    def compute(self) -> dict[str, Tensor]:
        """The mean losses by column of metrics.csv, for the ranges with at least one target on any process. Resets
        them."""
        sum_over_processes(self.sums, self.counts)
        found = {name: self.sums[n] / self.counts[n] for n, name in enumerate(self.columns) if self.counts[n] > 0}
        self.reset()
        return found
