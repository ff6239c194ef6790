"""Saves checkpoints, so that a killed process loses few steps, and a resumed run repeats and skips no data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from lkda.training.background import BackgroundWriter
from lkda.training.callbacks.divergence import require_finite
from lkda.training.callbacks.interruption import InterruptedRunError, StopRequest
from lkda.training.callbacks.steps import ends_step, validation_follows
from lkda.training.checkpoint import FORMAT, delete_old, point_to, step_path
from lkda.training.memory import return_freed_memory
from lkda.training.processes import process_count, value_of_first

_NONE_YET = {"step": 0, "loss": float("inf")}


class Checkpoints(Checkpoint):
    """Writes step_STEP.ckpt every `every_n_steps` optimizer steps or every `every_minutes`, at the best validation
    loss, at the end, and when a signal asks the run to stop. last.ckpt and best.ckpt are links to such files, not
    copies.

    Training stops only while the state is copied into the memory of the CPU. The file is written from the copy while
    training goes on; a checkpoint that is due before the one before it is written waits for that. If devices share the
    weights, training stops until all have written their parts.

    A step with a validation is saved after the validation, so that all rows of a saved step are in metrics.csv.
    Parameters that are not finite are never saved.

    Args:
        directory: the directory of the checkpoints.
        every_n_steps: optimizer steps between two checkpoints; None: not by steps.
        every_minutes: minutes between two checkpoints, by the clock of the first process; None: not by time.
        keep: how many step checkpoints are kept. With more than one, an earlier one is left if the newest is broken.
        writer: runs what is done while training goes on. The trainer's checkpoint plugin writes with it too.
        stop_request: checked at the end of every step.
        model, tokenizer, run: written into each file (see lkda.training.checkpoint).

    Attributes:
        count, seconds: the checkpoints of the run, before a resume too, and the seconds for which they stopped it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every_n_steps: int | None,
        every_minutes: float | None,
        keep: int,
        writer: BackgroundWriter,
        stop_request: StopRequest,
        model: dict[str, Any],
        tokenizer: str | None,
        run: dict[str, Any],
    ) -> None:
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.writer = writer
        self.stop_request = stop_request
        self.metadata = {"format": FORMAT, "model": model, "tokenizer": tokenizer, "run": run}
        self.best = dict(_NONE_YET)
        self.saved_step = -1
        self.count = 0
        self.seconds = 0.0
        self._saved_at = time.monotonic()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lkda"] = {**self.metadata, "step": trainer.global_step, "best": dict(self.best)}
        checkpoint["lkda_checkpoints"] = {"count": self.count, "seconds": self.seconds}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.best = checkpoint["lkda"]["best"]
        self.saved_step = checkpoint["lkda"]["step"]
        before = checkpoint.get("lkda_checkpoints", {})  # missing in checkpoints of earlier versions
        self.count, self.seconds = before.get("count", 0), before.get("seconds", 0.0)
        if trainer.is_global_zero:
            # The process may have been killed after it wrote the file and before it made the links.
            self._name("last.ckpt", self.saved_step)
            if self.best["step"] == self.saved_step:
                self._name("best.ckpt", self.saved_step)
            elif not (self.directory / "best.ckpt").exists():
                self.best = dict(_NONE_YET)  # the file is lost: the best of the later validations replaces it
        self.best = value_of_first(self.best)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()
        self.stop_request.take_over()
        if process_count() > 1:
            # Before each batch Lightning asks all processes for a SIGTERM, and waits for the device to answer.
            # `agreed` asks without waiting.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _name(self, name: str, step: int) -> None:
        point_to(step_path(self.directory, step), self.directory / name)

    def save(self, trainer: L.Trainer, *, best: bool = False) -> None:
        """Save this step, unless that is done already, and delete the oldest checkpoints.

        Args:
            best: whether best.ckpt becomes a link to it.
        """
        step = trainer.global_step
        if step != self.saved_step:
            self._save_step(trainer)
        elif not best:
            return
        names = ("last.ckpt", "best.ckpt") if best else ("last.ckpt",)
        if trainer.is_global_zero:
            self.writer.submit(lambda: self._finish(names, step))

    def _save_step(self, trainer: L.Trainer) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the steps that the device still computes do not count
        start = time.perf_counter()
        require_finite(trainer.lightning_module, step=trainer.global_step)
        self.writer.wait()
        trainer.save_checkpoint(step_path(self.directory, trainer.global_step))
        if trainer.strategy.root_device.type != "cpu":  # there the steps use the memory again
            self.writer.submit(return_freed_memory)
        self.saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self.count += 1
        self.seconds += time.perf_counter() - start

    def _finish(self, names: tuple[str, ...], step: int) -> None:
        for name in names:
            self._name(name, step)
        delete_old(self.directory, keep=self.keep)

    def _end_of_step(self, trainer: L.Trainer, *, due: bool = False, best: bool = False) -> None:
        self.writer.raise_errors()
        signum, time_due = None, False
        if trainer.global_step < trainer.max_steps:
            signum, time_due = self.stop_request.agreed(due=trainer.is_global_zero and self._time_is_due())
        steps_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if due or best or time_due or steps_due or signum is not None:
            self.save(trainer, best=best)
        if signum is not None:
            raise InterruptedRunError(signum, trainer.global_step)

    def _time_is_due(self) -> bool:
        return self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ends_step(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self._end_of_step(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loss = float(trainer.callback_metrics["val/loss"])
        best = loss < self.best["loss"]
        if best:
            self.best = {"step": trainer.global_step, "loss": loss}
        self._end_of_step(trainer, due=trainer.should_stop, best=best)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.writer.wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.writer.wait()


def _nothing() -> None:
    pass
