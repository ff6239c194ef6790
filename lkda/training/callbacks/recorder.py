"""Writes the rows of a run: the metrics logged at a step, with the tokens and the training seconds so far."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lkda.training.callbacks.steps import ends_step, validation_follows
from lkda.training.device_time import ComingValues, Moment
from lkda.training.throughput import Throughput

# Steps at the start of a process that do not count for the speed, because they compile, allocate and fill caches.
WARMUP_STEPS = 3


class Recorder(L.Callback):
    """Sends rows to every logger: one at every `every_n_steps`-th step, at the first and at the last step, and one
    after each validation. The row after the last validation also has the results on the test split.

    The rows of a step are written before its checkpoint, so that a resumed run has all rows up to its first step. The
    clock measures only training: it is stopped during validations and while checkpoints are written.

    A GPU does not wait for a row. Its values are copied when the step ends, and the row is written after the next batch
    has been given to the device, or before a validation or a checkpoint.

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
        self._running_since: Moment | None = None
        self._since: tuple[_Work, float] | None = None  # work and seconds at which the next speed measurement begins
        self._steps_here = 0
        self._work_here = _Work(0, 0.0)
        self._clipped = (0, 0)  # clipped steps and all steps of this process, at the last row
        self._waiting: _Row | None = None

    def read_clock(self, device: torch.device) -> float:
        """The seconds of training so far, when the device has ended its work."""
        return self.seconds if self._running_since is None else self._seconds_at(Moment(device))

    def _stop_clock(self, device: torch.device) -> None:
        if self._running_since is not None:
            self.seconds, self._running_since = self._seconds_at(Moment(device)), None

    def _seconds_at(self, moment: Moment) -> float:
        """The seconds of training at a moment after the last start of the clock. Waits for it."""
        assert self._running_since is not None
        return self.seconds + moment.seconds_since(self._running_since)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._running_since is None:
            self._running_since = Moment(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write_waiting(trainer)
        self._work_here = self._work_here.and_of(batch, self.throughput, devices=trainer.world_size)
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        self._steps_here += 1
        last = step >= trainer.max_steps
        if last:
            trainer.should_stop = True  # makes Lightning validate at the end, for any interval
        if self._steps_here == WARMUP_STEPS:
            self._since = (self._work_here, self._seconds_at(Moment(pl_module.device)))
        if last or step == 1 or step % self.every_n_steps == 0:
            completes = not validation_follows(trainer, batch_idx)
            self._waiting = _Row.of(trainer, steps_here=self._steps_here, work=self._work_here, completes=completes)
            if last or self._waiting.values.have_arrived():
                self._write_waiting(trainer)

    def _write_waiting(self, trainer: L.Trainer) -> None:
        """Write the row that waits for its values, if there is one."""
        if self._waiting is None:
            return
        found, self._waiting = self._waiting, None
        *values, clipped = found.values.read()
        row = {**dict(zip(found.names, values, strict=True)), "lr": found.lr}
        seconds = self._seconds_at(found.values.moment)
        if self._since is not None and found.steps_here > WARMUP_STEPS:
            before, seconds_before = self._since
            passed = seconds - seconds_before
            tokens, flops = found.work.tokens - before.tokens, found.work.flops - before.flops
            row |= self.throughput.columns(tokens / passed, flops / passed)
            self._since = (found.work, seconds)
        clipped_before, steps_before = self._clipped
        row["train/clipped_share"] = (clipped - clipped_before) / (found.steps_here - steps_before)
        self._clipped = (int(clipped), found.steps_here)
        self._write(trainer, row, step=found.step, seconds=seconds)
        if found.completes:
            _complete(trainer)

    def _write(self, trainer: L.Trainer, row: dict[str, float], *, step: int, seconds: float) -> None:
        self.latest |= row
        row = {"tokens": step * self.tokens_per_step, "seconds": seconds, **row}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_waiting(trainer)
        self._stop_clock(pl_module.device)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            row = {name: float(value) for name, value in (_logged(trainer, "val/") | _logged(trainer, "test/")).items()}
            self._write(trainer, row, step=trainer.global_step, seconds=self.seconds)
            _complete(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        with suppress(torch.AcceleratorError):  # a device that has failed has no values, and `exception` says why
            self._write_waiting(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._write_waiting(trainer)
        self._stop_clock(pl_module.device)
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


def _logged(trainer: L.Trainer, prefix: str) -> dict[str, torch.Tensor]:
    """The metrics that the task logged under that prefix."""
    return {name: value for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class _Work:
    """What this process and those beside it have trained on: tokens, and their FLOPs. Batches may differ in length."""

    tokens: int
    flops: float

    def and_of(self, batch: Mapping[str, Any], throughput: Throughput, *, devices: int) -> _Work:
        """With a batch, of which each device has an equal share like this one."""
        tokens, flops = batch["tokens"].numel(), throughput.flops_of(batch)
        return _Work(self.tokens + devices * tokens, self.flops + devices * flops)


@dataclass(frozen=True)
class _Row:
    """A row of a training step, whose values are on their way to the host.

    Attributes:
        step: the optimizer step.
        steps_here, work: the number of optimizer steps of this process, and their work.
        names: of the metrics.
        values: of the metrics, and the number of clipped steps of this process.
        lr: the learning rate.
        completes: whether it is the last row of the step.
    """

    step: int
    steps_here: int
    work: _Work
    names: tuple[str, ...]
    values: ComingValues
    lr: float
    completes: bool

    @classmethod
    def of(cls, trainer: L.Trainer, *, steps_here: int, work: _Work, completes: bool) -> _Row:
        """The row of the step that has just ended."""
        task = trainer.lightning_module
        metrics, clipped = task.step_metrics, task.clipped_steps
        assert isinstance(metrics, dict)
        assert isinstance(clipped, torch.Tensor)
        values = ComingValues([*metrics.values(), clipped.to(next(iter(metrics.values())).device)])
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        return cls(trainer.global_step, steps_here, work, tuple(metrics), values, lr, completes)
