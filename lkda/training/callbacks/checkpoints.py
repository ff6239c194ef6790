"""Saves checkpoints, so that a killed process loses few steps, and a resumed run repeats and skips no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lkda.training.callbacks.divergence import require_finite
from lkda.training.callbacks.interruption import InterruptedRunError, StopRequest
from lkda.training.callbacks.steps import ends_step, validation_follows
from lkda.training.checkpoint import FORMAT, delete_old, point_to, step_path
from lkda.training.processes import process_count, value_of_first

_NONE_YET = {"step": 0, "loss": float("inf")}


class Checkpoints(Checkpoint):
    """Writes step_STEP.ckpt every `every_n_steps` optimizer steps, at the best validation loss, at the end, and when a
    signal asks the run to stop. last.ckpt and best.ckpt are links to such files, not copies.

    A step with a validation is saved after the validation, so that all rows of a saved step are in metrics.csv.
    Parameters that are not finite are never saved.

    Args:
        directory: the directory of the checkpoints.
        every_n_steps: optimizer steps between two checkpoints.
        keep: how many step checkpoints are kept. With more than one, an earlier one is left if the newest is broken.
        stop_request: checked at the end of every step.
        model, tokenizer, run: written into each file (see lkda.training.checkpoint).
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_steps: int,
        keep: int,
        stop_request: StopRequest,
        model: dict[str, Any],
        tokenizer: str | None,
        run: dict[str, Any],
    ) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.stop_request = stop_request
        self.metadata = {"format": FORMAT, "model": model, "tokenizer": tokenizer, "run": run}
        self.best = dict(_NONE_YET)
        self.saved_step = -1

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lkda"] = {**self.metadata, "step": trainer.global_step, "best": dict(self.best)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["lkda"]["best"]
        self.saved_step = checkpoint["lkda"]["step"]
        if trainer.is_global_zero:
            # The process may have been killed after it wrote the file and before it made the links.
            self._name("last.ckpt", self.saved_step)
            if self.best["step"] == self.saved_step:
                self._name("best.ckpt", self.saved_step)
            elif not (self.directory / "best.ckpt").exists():
                self.best = dict(_NONE_YET)  # the file is lost: the best of the later validations replaces it
        self.best = value_of_first(self.best)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if process_count() > 1:
            self.stop_request.take_over()
            # Before each batch Lightning asks all processes for a SIGTERM, and waits for the device to answer.
            # `agreed` asks without waiting.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _name(self, name: str, step: int) -> None:
        point_to(step_path(self.directory, step), self.directory / name)

    def save(self, trainer: L.Trainer) -> None:
        """Write this step's checkpoint, unless it exists already, and delete the oldest ones."""
        step = trainer.global_step
        if step == self.saved_step:
            return
        require_finite(trainer.lightning_module, step=step)
        trainer.save_checkpoint(step_path(self.directory, step))
        self.saved_step = step
        if trainer.is_global_zero:
            self._name("last.ckpt", step)
            delete_old(self.directory, keep=self.keep)

    def _end_of_step(self, trainer: L.Trainer, *, due: bool) -> None:
        signum = self.stop_request.agreed() if trainer.global_step < trainer.max_steps else None
        if due or signum is not None or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
        if signum is not None:
            raise InterruptedRunError(signum, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self._end_of_step(trainer, due=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        best = loss < self.best["loss"]
        if best:
            self.best = {"step": trainer.global_step, "loss": loss}
        self._end_of_step(trainer, due=best or trainer.should_stop)
        if best and trainer.is_global_zero:
            self._name("best.ckpt", trainer.global_step)
            delete_old(self.directory, keep=self.keep)  # the best one before


def _nothing() -> None:
    pass
