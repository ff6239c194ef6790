"""The mean over all targets of an optimizer step whose batch is split into pieces (trainer.accumulate_grad_batches) and
among processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.targets import IGNORE_INDEX
from lkda.training.processes import process_count, sum_over_processes


class StepMean:
    """Makes the loss and the gradients of a step means over all its targets, however its batch is split into pieces and
    among processes.

    Lightning adds the gradients of each piece's mean loss, times 1 / pieces, and averages them over the processes. This
    is the mean over the step's targets only if all pieces have the same number of targets, as the rows of a text have.
    Otherwise a piece must be weighted by its number of targets, and the total is known only after the last piece.
    Therefore the loss of a piece with n targets is multiplied by n / n_1, where n_1 is the number of the first piece,
    averaged over the processes. After the last piece, the gradients must be multiplied by `factor`, which is
    pieces * processes * n_1 / (sum of n). If all numbers are equal, both factors are exactly 1. All values stay on the
    device, so that no step waits for it.
    """

    unit: Tensor
    piece: Tensor
    count: Tensor
    total: Tensor

    def weight(self, targets: Tensor, *, first: bool) -> Tensor:
        """The factor for a piece's loss before its backward pass, a scalar on the device.

        Args:
            targets: of the piece, int64; IGNORE_INDEX where nothing is predicted.
            first: whether this is the step's first piece.
        """
        count = (targets != IGNORE_INDEX).sum()
        if first:
            of_all = count.clone()
            sum_over_processes(of_all)
            self.unit = of_all.clamp(min=1) / process_count()
            self.count, self.total = torch.zeros_like(count), torch.zeros((), device=targets.device)
        self.count = self.count + count
        self.piece = count
        return count / self.unit

    def add(self, loss: Tensor) -> Tensor:
        """Add `loss`, the mean over the targets of the piece for which `weight` was last called. Returns it, or 0 for a
        piece without targets, whose mean is NaN."""
        loss = torch.where(self.piece > 0, loss, 0.0)
        self.total = self.total + loss.detach() * self.piece
        return loss

    def complete(self) -> None:
        """Add what the other processes have. Call it once, after `add` of the step's last piece."""
        sum_over_processes(self.total, self.count)

    @property
    def loss(self) -> Tensor:
        """The mean loss over the targets of the step's pieces so far, in nats per token. It is that of all processes
        after `complete`, and that of this process before."""
        return self.total / self.count

    def factor(self, pieces: int) -> Tensor:
        """What the gradients must be multiplied by to be those of `loss`. Call it after `complete`."""
        return pieces * process_count() * self.unit / self.count.clamp(min=1)
