"""Stops a run whose loss or parameters become NaN or infinite, or whose steps are skipped for that reason for long."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lkda.training.callbacks.steps import ends_step
from lkda.training.device_time import ComingValues
from lkda.training.processes import everywhere, local, process_count

# A run that skips bad steps ends after so many of them one after another: it would learn nothing more.
MOST_SKIPPED = 20


class DivergedError(RuntimeError):
    """Training produced a NaN or an infinity.

    Args:
        what: the value that is not finite, such as "the loss".
        step: the first optimizer step at which this was observed.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} became NaN or infinite at step {step}")
        self.step = step


def require_finite(model: nn.Module, *, step: int) -> None:
    """Raise DivergedError unless every parameter is finite, on every process. It is called before a checkpoint is
    written."""
    finite = torch.stack([local(parameter.detach()).isfinite().all() for parameter in model.parameters()])
    if not everywhere(bool(finite.all()), device=finite.device):
        raise DivergedError("a parameter", step)


class DivergenceGuard(L.Callback):
    """Raises DivergedError with the first step whose loss was not finite.

    On a GPU the loss is read only every `every_n_steps` steps, and after the next step has begun, so that the device
    does not wait, and at each validation. The first bad step is stored on the device, so that the reported step is
    still the first one.

    Args:
        every_n_steps: optimizer steps, as of the rows of metrics.csv.
        skips: whether the task skips bad steps. The error is then raised after MOST_SKIPPED of them one after another.
    """

    def __init__(self, every_n_steps: int = 10, *, skips: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.skips = skips
        self.first_bad_step: Tensor | None = None
        self._coming: ComingValues | None = None  # what was asked at the last of these steps
        self._skipped_before = 0  # by the processes before a resume

    def skipped_steps(self, pl_module: L.LightningModule) -> int:
        """The steps that were skipped since the run began. This waits for the device."""
        assert isinstance(pl_module.skipped_steps, Tensor)
        return self._skipped_before + int(pl_module.skipped_steps)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lkda_skipped"] = self.skipped_steps(pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._skipped_before = checkpoint.get("lkda_skipped", 0)  # missing in checkpoints of earlier versions

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if process_count() > 1 and not ends_step(trainer, batch_idx):
            return  # the processes know each other's losses only at the end of the step, and must stop together
        if self.skips:
            if ends_step(trainer, batch_idx):
                self._check_skipped(trainer, pl_module)
            return
        loss = outputs["mean"]
        # The trainer counts a step after the last of its batches.
        step = trainer.global_step if ends_step(trainer, batch_idx) else trainer.global_step + 1
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=loss.device)
        new = ~loss.detach().isfinite() & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(new, step, self.first_bad_step)
        first = self._read(self.first_bad_step, step)
        if first is not None and first >= 0:
            raise DivergedError("the loss", first)

    def _check_skipped(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module.skipped_in_a_row, Tensor)
        count = self._read(pl_module.skipped_in_a_row, trainer.global_step)
        if count is not None and count >= MOST_SKIPPED:
            raise DivergedError(f"the loss or the gradient of each of the last {count} steps", trainer.global_step)

    def _read(self, value: Tensor, step: int) -> int | None:
        """The value on a CPU. On a GPU the value of the batch before this one, if it was one of those that are read."""
        if value.device.type == "cpu":
            return int(value)
        before, self._coming = self._coming, ComingValues([value]) if step % self.every_n_steps == 0 else None
        return None if before is None else int(before.read()[0])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first = -1 if self.first_bad_step is None else int(self.first_bad_step)
        if first >= 0:
            raise DivergedError("the loss", first)
        if not trainer.callback_metrics["val/loss"].isfinite():
            raise DivergedError("the validation loss", trainer.global_step)
