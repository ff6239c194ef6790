"""Measures the steps of a run of scripts/train.py, then ends the run."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lkda.commands.benchmarks.step_clock import StepClock, Steps
from lkda.training.callbacks.steps import ends_step


class MeasuredError(Exception):
    """Ends a training whose steps are measured: without a validation, and without checkpoints."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__("the steps are measured")
        self.row = row


class StepMeasurement(L.Callback):
    """Measures the steps of a training, then ends it with `MeasuredError`. Built by the group callbacks of a run.

    Its clock starts when the trainer is built, which is right after the run directory is printed.

    Args:
        warmup, timed, profiled: see `Steps`.
    """

    def __init__(self, *, warmup: int, timed: int, profiled: int, tokens_per_step: int, device: str) -> None:
        steps = Steps(warmup, timed, profiled)
        self.clock = StepClock(steps, tokens_per_step=tokens_per_step, device=torch.device(device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and self.clock.after(trainer.global_step):
            raise MeasuredError(self.clock.row)
