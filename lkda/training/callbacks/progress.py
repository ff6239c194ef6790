"""What a run shows while it trains: loss, bits per byte, tokens/s and the time left."""

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

from lkda.training.callbacks.recorder import Recorder

_SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/bits_per_byte": "{:.3f} bpb",
    "tokens_per_s": "{:,.0f} tok/s",
    "val/loss": "val {:.3f}",
    "val/accuracy": "acc {:.1%}",
}
SECONDS_BETWEEN_LINES = 30


def describe(row: dict[str, float]) -> str:
    """The shown part of a row of the Recorder, as text that fits a narrow terminal beside a bar."""
    return "  ".join(form.format(row[name]) for name, form in _SHOWN.items() if name in row)


class TrainingProgress(RichProgressBar):
    """Lightning's rich bar, over the steps of the whole run. Where the output is no terminal (a log file, CI), a line
    now and then and at each validation instead.

    It shows the Recorder's latest row: asking the device for each step's loss would make the device wait.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=4, leave=True, theme=RichProgressBarTheme(metrics=""))
        self.lines = not get_console().is_terminal
        self._last_line = time.monotonic()
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

    def _row(self, trainer: L.Trainer) -> str:
        callbacks: list[L.Callback] = getattr(trainer, "callbacks")  # noqa: B009 (unknown to mypy: set outside __init__)
        return describe(next(callback for callback in callbacks if isinstance(callback, Recorder)).latest)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {"loss": self._row(trainer).removeprefix("loss ")}

    def _print_line(self, trainer: L.Trainer) -> None:
        self._last_line = time.monotonic()
        print(f"step {trainer.global_step}/{trainer.max_steps}  {self._row(trainer)}", flush=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.lines and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._print_line(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.lines:
            self._print_line(trainer)
