"""Rows whose values reach the host later than the step ends, as on a GPU."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lkda.commands.train import train
from lkda.metrics_file import read_metrics
from lkda.training.callbacks import Checkpoints, DivergenceGuard
from lkda.training.device_time import ComingValues, Moment
from lkda.training.task import LanguageModelTask
from tests.commands.small import TIMES, composed, small_run

OPTIONS = (
    "mixer=simplified",
    "trainer.max_steps=9",
    "trainer.log_every_n_steps=2",
    "trainer.val_check_interval=6",
    "checkpoint.every_n_steps=4",
)


def rows_of(directory: Path) -> list[dict[str, str]]:
    rows = read_metrics(directory / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComingValues, "have_arrived", lambda self: False)


@pytest.mark.slow
def test_rows_that_come_late_are_the_same_rows(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = composed("train", *small_run(corpus, *OPTIONS))
    train(config, tmp_path / "at_once")
    request.getfixturevalue("late")
    begun, saved = list[tuple[int, int]](), dict[int, int]()
    start, save = LanguageModelTask.on_train_batch_start, Checkpoints.save

    def starting(self: LanguageModelTask, batch: Any, batch_idx: int) -> None:
        begun.append((self.trainer.global_step, len(rows_of(tmp_path / "late"))))
        start(self, batch, batch_idx)

    def saving(self: Checkpoints, trainer: Any, *, best: bool = False) -> None:
        save(self, trainer, best=best)
        saved[trainer.global_step] = int(rows_of(tmp_path / "late")[-1]["step"])

    monkeypatch.setattr(LanguageModelTask, "on_train_batch_start", starting)
    monkeypatch.setattr(Checkpoints, "save", saving)
    train(config, tmp_path / "late")
    assert rows_of(tmp_path / "late") == rows_of(tmp_path / "at_once")
    assert dict(begun)[2] == 1  # the row of step 2 is not there when step 3 begins
    assert saved == {4: 4, 6: 6, 8: 8, 9: 9}  # a checkpoint is written after the rows of its step


def test_the_speed_counts_the_tokens_of_each_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a synthetic task differ in length, and have logits for few tokens."""
    clock = iter(range(10**6))
    monkeypatch.setattr("lkda.training.device_time.time.perf_counter", lambda: float(next(clock)))
    lengths = "data.train=[{length: 16, pairs: 2, examples: 16}, {length: 64, pairs: 2, examples: 16}]"
    words = ("debug=fast", "data=mqar", "trainer=cpu", "mixer=softmax", "data.batch_size=4", lengths)
    train(composed("train", *words, "trainer.max_steps=12", "trainer.val_check_interval=12"), tmp_path / "run")
    rows = [row for row in read_metrics(tmp_path / "run/metrics.csv") if row["tokens_per_s"]]
    seconds = {1.0, 2.0, 3.0}  # what the clock shows between two rows
    speeds = {float(row["tokens_per_s"]) for row in rows}
    assert speeds <= {4 * length / second for length in (16, 64) for second in seconds}
    assert max(speeds) / min(speeds) >= 3
    per_token = [1e12 * float(row["tflops_per_s"]) / float(row["tokens_per_s"]) for row in rows]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert max(per_token) < 3 * summary["flops_per_token"]  # which has the logits of every token
    assert len({round(flops) for flops in per_token}) == 2
    assert summary["tflops_per_s"] == statistics.median(float(row["tflops_per_s"]) for row in rows)


@pytest.mark.usefixtures("late")
def test_a_row_is_written_when_the_run_fails(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = LanguageModelTask.training_step

    def failing(self: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 2:
            raise RuntimeError("a failure")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "training_step", failing)
    with pytest.raises(RuntimeError, match="a failure"):
        train(composed("train", *small_run(corpus, *OPTIONS)), tmp_path / "run")
    assert [row["step"] for row in rows_of(tmp_path / "run")] == ["1", "2"]


def test_a_bad_loss_is_found_after_the_next_step_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = DivergenceGuard(every_n_steps=3)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    made: list[float] = []

    class Coming:
        def __init__(self, values: list[Any]) -> None:
            made.append(2.0)

        def read(self) -> list[float]:
            return [made[-1]]

    monkeypatch.setattr("lkda.training.callbacks.divergence.ComingValues", Coming)
    assert [guard._read(on_gpu, step) for step in range(1, 8)] == [None, None, None, 2, None, None, 2]
    assert len(made) == 2


def test_moments_and_values_of_a_cpu() -> None:
    before = Moment(torch.device("cpu"))
    coming = ComingValues([torch.tensor(1.5), torch.tensor([7]), torch.tensor(True)])
    assert coming.have_arrived()
    assert coming.read() == [1.5, 7.0, 1.0]
    assert 0 < coming.moment.seconds_since(before) < 10
    assert before.seconds_since(coming.moment) == -coming.moment.seconds_since(before)
