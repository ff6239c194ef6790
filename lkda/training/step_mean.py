"""The mean over the targets of an optimiser step whose batch comes in pieces (trainer.accumulate_grad_batches)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lkda.special_tokens import IGNORE_INDEX


class StepMean:
    """Makes a step the same however its batch is cut: loss and gradients are means over all its targets.

    Lightning adds the gradients of each piece's mean loss times 1 / pieces. That is the mean over the step's targets
    where all pieces have equally many, as the rows of a text have. Where they have not, a piece must count by its
    targets, whose total is known only after the last piece. So each piece's loss is multiplied by n / n_1, n its
    number of targets and n_1 the first piece's, and `normalize` multiplies the gradients by pieces * n_1 / (sum of n).
    For equal numbers both factors are exactly 1. All of it stays on the device, so that no step waits.
    """

    unit: Tensor
    piece: Tensor
    count: Tensor
    total: Tensor

    def weight(self, targets: Tensor, *, first: bool) -> Tensor:
        """What a piece's loss is multiplied by before its backward.

        Args:
            targets: of the piece, int64; IGNORE_INDEX where nothing is predicted.
            first: whether this is the step's first piece.
        """
        count = (targets != IGNORE_INDEX).sum()
        if first:
            self.unit, self.count = count.clamp(min=1), torch.zeros_like(count)
            self.total = torch.zeros((), device=targets.device)
        self.count = self.count + count
        self.piece = count
        return count / self.unit

    def add(self, loss: Tensor) -> Tensor:
        """Take in the mean loss over the targets of the piece that `weight` was last called for; returns it, or 0 where
        it has no targets, whose mean is NaN."""
        loss = torch.where(self.piece > 0, loss, 0.0)
        self.total = self.total + loss.detach() * self.piece
        return loss

    @property
    def loss(self) -> Tensor:
        """The mean loss over the targets of the step's pieces so far."""
        return self.total / self.count

    def normalize(self, parameters: Iterable[nn.Parameter], *, pieces: int) -> None:
        """Make the gradients those of `loss`, after the last of the step's pieces."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, pieces * self.unit / self.count.clamp(min=1))
