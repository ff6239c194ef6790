"""The progress display of a run: loss, bits per byte, speed, memory and the time left."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import (
    BatchesProcessedColumn,
    CustomBarColumn,
    RichProgressBarTheme,
)
from rich import get_console
from rich.progress import TextColumn, TimeRemainingColumn

from lkda.training.callbacks.recorder import WARMUP_STEPS, Recorder
from lkda.training.callbacks.steps import ends_step
from lkda.training.callbacks.time_left import TimeLeft, announcement, duration, validations_left

_SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/bits_per_byte": "{:.3f} bpb",
    "tokens_per_s": "{:,.0f} tok/s",
    "tflops_per_s": "{:.3g} TFLOP/s",
    "mfu": "{:.0%} mfu",
    "peak_memory_gib": "{:.1f} GiB",
    "val/loss": "val {:.3f}",
    "val/accuracy": "acc {:.1%}",
}
SECONDS_BETWEEN_LINES = 30
# The number of steps after the warm-up that are timed for the first estimate.
TIMED_STEPS = 5


def describe(row: dict[str, float]) -> str:
    """The displayed values of a Recorder's row, as text that fits beside a bar on a narrow terminal."""
    return "  ".join(form.format(row[name]) for name, form in _SHOWN.items() if name in row)


class TrainingProgress(RichProgressBar):
    """Lightning's rich progress bar over the steps of the whole run. If the output is not a terminal (a log file, CI),
    a line is printed every 30 seconds and at each validation instead. After the first few steps, a line says how long
    the run will take.

    The display shows the Recorder's latest row. Reading the loss of every step would make the device wait.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, leave=True, theme=RichProgressBarTheme(metrics=""))
        self.lines = not get_console().is_terminal
        self._last_line = time.monotonic()
        self._time_left = TimeLeft()
        self._steps_here = 0
        self._timed_from = 0.0
        self._validating_since = 0.0
        if self.lines:
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    @property
    def validation_description(self) -> str:
        return "check"

    def _get_train_description(self, current_epoch: int) -> str:
        return "train"

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(bar_width=8),
            BatchesProcessedColumn(style=self.theme.batch_progress),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]

    def _recorder(self, trainer: L.Trainer) -> Recorder:
        callbacks: list[L.Callback] = getattr(trainer, "callbacks")  # noqa: B009 (unknown to mypy: set outside __init__)
        return next(callback for callback in callbacks if isinstance(callback, Recorder))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {"loss": describe(self._recorder(trainer).latest).removeprefix("loss ")}

    def _print_line(self, trainer: L.Trainer) -> None:
        self._last_line = time.monotonic()
        recorder = self._recorder(trainer)
        if "tokens_per_s" in recorder.latest:
            self._time_left.step_seconds = recorder.tokens_per_step / recorder.latest["tokens_per_s"]
        seconds = self._time_left.seconds(trainer)
        left = f"  {duration(seconds)} left" if seconds is not None and trainer.global_step < trainer.max_steps else ""
        print(f"step {trainer.global_step}/{trainer.max_steps}  {describe(recorder.latest)}{left}", flush=True)

    def _estimate(self, trainer: L.Trainer) -> None:
        """Time the first steps after the warm-up, and then print how long the run will take."""
        self._steps_here += 1
        if self._steps_here == WARMUP_STEPS:
            self._timed_from = self._recorder(trainer).read_clock(trainer.lightning_module.device)
        if self._steps_here != WARMUP_STEPS + TIMED_STEPS or trainer.global_step >= trainer.max_steps:
            return
        recorder = self._recorder(trainer)
        step_seconds = (recorder.read_clock(trainer.lightning_module.device) - self._timed_from) / TIMED_STEPS
        self._time_left.step_seconds = step_seconds
        seconds = self._time_left.seconds(trainer)
        assert seconds is not None
        line = announcement(
            step=trainer.global_step,
            max_steps=trainer.max_steps,
            validations=validations_left(trainer),
            seconds=seconds,
            step_seconds=step_seconds,
            tokens_per_step=recorder.tokens_per_step,
        )
        if self.lines:
            print(line, flush=True)
        else:
            get_console().print(line, soft_wrap=True, highlight=False, markup=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not trainer.is_global_zero:
            return
        if ends_step(trainer, batch_idx):
            self._estimate(trainer)
        if self.lines and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._print_line(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._validating_since = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._time_left.validation_seconds = time.perf_counter() - self._validating_since
        if self.lines and trainer.is_global_zero:
            self._print_line(trainer)
