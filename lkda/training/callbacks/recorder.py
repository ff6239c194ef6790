"""Writes the rows of a run: the metrics logged at a step, with the tokens and the training seconds so far."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lkda.training.callbacks.steps import ends_step, validation_follows
from lkda.training.throughput import Throughput

# Steps at the start of a process that do not count for the speed, because they compile, allocate and fill caches.
WARMUP_STEPS = 3


class Recorder(L.Callback):
    """Sends rows to every logger: one at every `every_n_steps`-th step, at the first and at the last step, and one
    after each validation. The row after the last validation also has the results on the test split.

    The rows of a step are written before its checkpoint, so that a resumed run has all rows up to its first step. The
    clock measures only training: it is stopped during validations and while checkpoints are written.

    Args:
        every_n_steps: optimizer steps between two rows.
        tokens_per_step: over all devices and accumulated batches.
        throughput: what the rows say of the device beside tokens per second.
    """

    def __init__(self, *, every_n_steps: int, tokens_per_step: int, throughput: Throughput) -> None:
        self.throughput = throughput
        self.every_n_steps = every_n_steps
        self.tokens_per_step = tokens_per_step
        self.seconds = 0.0
        self.latest: dict[str, float] = {}
        self._running_since: float | None = None
        self._since: tuple[int, float] | None = None  # tokens and seconds at which the next speed measurement begins
        self._steps_here = 0
        self._clipped = (0, 0)  # clipped steps and all steps of this process, at the last row

    def tokens(self, trainer: L.Trainer) -> int:
        """The number of tokens trained on so far, including those before a resume."""
        return trainer.global_step * self.tokens_per_step

    def read_clock(self) -> float:
        """The seconds of training so far, after a synchronization with the GPU."""
        self._read_clock()
        return self.seconds

    def _start_clock(self) -> None:
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._running_since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def _read_clock(self) -> None:
        self._stop_clock()
        self._start_clock()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start_clock()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        self._steps_here += 1
        last = step >= trainer.max_steps
        if last:
            trainer.should_stop = True  # makes Lightning validate at the end, for any interval
        if self._steps_here == WARMUP_STEPS:
            self._read_clock()
            self._since = (self.tokens(trainer), self.seconds)
        if last or step == 1 or step % self.every_n_steps == 0:
            self._read_clock()
            self._write_training_row(trainer)
            if not validation_follows(trainer, batch_idx):
                _complete(trainer)

    def _write_training_row(self, trainer: L.Trainer) -> None:
        row = {**_logged(trainer, "train/"), "lr": trainer.optimizers[0].param_groups[0]["lr"]}
        if self._since is not None and self._steps_here > WARMUP_STEPS:
            tokens, seconds = self._since
            row["tokens_per_s"] = (self.tokens(trainer) - tokens) / (self.seconds - seconds)
            row |= self.throughput.columns(row["tokens_per_s"])
            self._since = (self.tokens(trainer), self.seconds)
        clipped, steps = self._clipped_since(trainer.lightning_module)
        row["train/clipped_share"] = clipped / steps
        self._clipped = (self._clipped[0] + clipped, self._clipped[1] + steps)
        self._write(trainer, row)

    def _write(self, trainer: L.Trainer, row: dict[str, float]) -> None:
        self.latest |= row
        row = {"tokens": self.tokens(trainer), "seconds": self.seconds, **row}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._write(trainer, _logged(trainer, "val/") | _logged(trainer, "test/"))
            _complete(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stop_clock()
        checkpoint["lkda_seconds"] = self.seconds
        checkpoint["lkda_clipped"] = self._clipped_since(pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.seconds = checkpoint["lkda_seconds"]
        clipped, steps = checkpoint.get("lkda_clipped", (0, 0))  # missing in checkpoints of earlier versions
        self._clipped = (-clipped, -steps)

    def _clipped_since(self, pl_module: L.LightningModule) -> tuple[int, int]:
        """The number of clipped steps, and of all steps, since the last row."""
        assert isinstance(pl_module.clipped_steps, torch.Tensor)
        return int(pl_module.clipped_steps) - self._clipped[0], self._steps_here - self._clipped[1]


def _complete(trainer: L.Trainer) -> None:
    """Call `save` of every logger, which then has all rows of this step."""
    for logger in trainer.loggers:
        logger.save()


def _logged(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    """The metrics that the task logged under that prefix."""
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name.startswith(prefix)}
