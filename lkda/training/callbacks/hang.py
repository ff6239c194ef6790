"""Ends a process whose GPU waits too long for another process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lkda.training.processes import process_count


class HangGuard(L.Callback):
    """Calls `give_up` if the GPU has finished no backward pass and no validation batch for `seconds`, although one was
    launched.

    This is so if another process of the run hangs. PyTorch measures the time of each exchange through NCCL, but not of
    those in a CUDA graph. While the GPU waits, calls of CUDA may block. Therefore the GPU counts in the memory of the
    host what it has finished, and a thread reads the count there.

    Args:
        give_up: ends the process. It is called in the thread.
        every: seconds between two looks at the count.
    """

    def __init__(self, seconds: float, give_up: Callable[[], object], *, every: float = 1.0) -> None:
        self.seconds, self._give_up, self._every = seconds, give_up, every
        self.launched = 0
        self._count: Tensor | None = None
        self._ended = threading.Event()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda" and process_count() > 1:
            self.watch(pl_module.device)

    def watch(self, device: torch.device) -> None:
        """Begin to count."""
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._finished = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        threading.Thread(target=self._look, args=[self._finished.numpy(), self._ended], daemon=True).start()

    def _look(self, finished: Any, ended: threading.Event) -> None:
        seen, since = 0, time.monotonic()
        while not ended.wait(self._every):
            now = time.monotonic()
            if int(finished) != seen or seen == self.launched:
                seen, since = int(finished), now
            elif now - since > self.seconds:
                self._give_up()
                return

    def _launch(self) -> None:
        """Let the GPU count when it has finished what was launched so far."""
        if self._count is not None:
            self._count += 1
            self._finished.copy_(self._count, non_blocking=True)
            self.launched += 1

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._launch()

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        self._launch()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._ended.set()
