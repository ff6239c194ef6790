"""Finds the training batches at which an optimizer step is complete."""

from __future__ import annotations

import lightning as L


def ends_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this training batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this training batch. The step is then complete only after the validation."""
    assert isinstance(trainer.val_check_batch, int)
    return (batch_idx + 1) % trainer.val_check_batch == 0 or trainer.should_stop
