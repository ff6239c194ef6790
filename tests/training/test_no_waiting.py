"""A training step reads no tensor on the host: on a GPU, each such read would wait for the device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.commands.train import train
from lkda.training.callbacks import DivergenceGuard
from lkda.training.task import LanguageModelTask
from tests.commands.small import composed, small_run

CORPUS = "All the world's a stage, and all the men and women merely players.\n" * 400


class Reads(TorchDispatchMode):
    """Records the step and the file that each value is read from on the host, for files of lkda and Lightning.

    The operators' own files are left out: on a CPU they read sequence bounds, which the kernels do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.found: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.step is not None:
            self.found.append((self.step, reader()))
        return func(*args, **(kwargs or {}))


def reader() -> str:
    """The innermost file of lkda or Lightning on the stack."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if {"lkda", "lightning"} & set(path.parts):
            return path.name if "ops" not in path.parts else "ops"
        frame = frame.f_back
    return "unknown"


@contextmanager
def counted_steps(reads: Reads, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it, `reads` knows the step of each read."""
    start = LanguageModelTask.on_train_batch_start

    def starting(self: LanguageModelTask, batch: Any, batch_idx: int) -> None:
        reads.step = self.trainer.global_step + 1
        start(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "on_train_batch_start", starting)
    with reads:
        yield


def test_no_value_is_read_between_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    options = (
        "trainer.max_steps=12",
        "trainer.log_every_n_steps=6",
        "trainer.val_check_interval=12",
        "checkpoint.every_n_steps=12",
    )
    config = composed("train", *small_run(corpus, *options, "mixer=simplified"))
    reads, intervals, made = Reads(), list[int](), DivergenceGuard.__init__

    def noted(self: DivergenceGuard, every_n_steps: int, *, skips: bool) -> None:
        intervals.append(every_n_steps)
        made(self, every_n_steps, skips=skips)

    monkeypatch.setattr(DivergenceGuard, "__init__", noted)
    with counted_steps(reads, monkeypatch):
        train(config, tmp_path / "run")
    between = {file for step, file in reads.found if step in (2, 3, 4, 5, 7, 8, 9, 10, 11)}
    assert {step for step, file in reads.found if file == "device_time.py"} >= {1, 6, 12}  # rows are seen
    assert between - {"ops"} == {"divergence.py"}  # on a CPU it reads each loss, on a GPU those of rows
    assert intervals == [6]
