"""Ends a run as soon as its model has learnt the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from lkda.checks import InputError


def check_has_accuracy(val_subsets: Sequence[Mapping[str, int]]) -> None:
    """Raise InputError if the validation has no subsets, as that of text, so that its accuracy is not measured."""
    if not val_subsets:
        raise InputError("StopWhenLearnt needs data with an accuracy, such as data=mqar: leave it out for text.")


@dataclass(frozen=True)
class LearntRun:
    """A run that ended before its last step, because the model has learnt the task.

    Attributes:
        step: the last optimizer step.
    """

    step: int


class StopWhenLearnt(L.Callback):
    """Ends the run after a validation whose mean accuracy is `accuracy` or more. The run then counts as finished,
    and has a checkpoint of its last step. If that is resumed, the run ends at once, unless `accuracy` has become
    higher.

    Args:
        accuracy: a share of the target positions, above 0 and at most 1.
    Raises: InputError if `accuracy` is outside that range; at the start of the training, if the data are text.
    """

    def __init__(self, accuracy: float) -> None:
        if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 < accuracy <= 1:
            raise InputError(f"the accuracy of StopWhenLearnt must be above 0 and at most 1, got {accuracy!r}.")
        self.accuracy = accuracy
        self._last = {"step": -1, "accuracy": 0.0}  # of the last validation

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_has_accuracy(trainer.datamodule.val_subsets)  # type: ignore[attr-defined]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lkda_learnt"] = dict(self._last)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last = dict(checkpoint.get("lkda_learnt", self._last))  # missing in checkpoints of earlier versions

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_learnt(trainer)  # the process may have been killed after it wrote the last checkpoint

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            accuracy = float(trainer.callback_metrics["val/accuracy"])
            self._last = {"step": trainer.global_step, "accuracy": accuracy}
            self._stop_if_learnt(trainer)  # the checkpoint is written after this: Lightning puts `Checkpoints` last

    def _stop_if_learnt(self, trainer: L.Trainer) -> None:
        early = self._last["step"] == trainer.global_step < trainer.max_steps
        if early and self._last["accuracy"] >= self.accuracy:
            trainer.should_stop = True
