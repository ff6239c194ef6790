"""The faults that docs/guides/long_runs.md lists: what the user sees, and that the run continues as if it had not been.

Other files test some of them: damaged checkpoints (tests/training/test_damaged_checkpoints.py), signals and kills at
every write (test_resume.py), a killed process of several (test_many_processes.py), W&B
(tests/training/test_wandb_logger.py) and changed data (test_identity.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.command_line import readable_errors
from lkda.commands.run_directory import RunDirectory
from lkda.commands.train import train
from lkda.training.checkpoint import read_checkpoint, step_files
from lkda.training.task import LanguageModelTask
from tests.commands.small import composed, small_run
from tests.commands.test_full_disk import largest_file
from tests.commands.test_resume import rows

EVERY = 3
OPTIONS = (
    "trainer.max_steps=16",
    "trainer.val_check_interval=5",
    "trainer.limit_val_batches=1",
    f"checkpoint.every_n_steps={EVERY}",
    "sample.max_new_tokens=0",
)
NOBODY = 65534


def run(corpus: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    return train(composed("train", *small_run(corpus, *OPTIONS, *overrides)), directory)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(corpus, directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    saved = read_checkpoint(directory / "checkpoints" / "last.ckpt")
    found: dict[str, torch.Tensor] = saved["state_dict"]
    return found


def assert_resumes(corpus: Path, directory: Path, whole: Path) -> None:
    """The resumed run has the rows and the weights of the whole run, bit for bit."""
    assert run(corpus, directory, "resume=true")["status"] == "finished"
    assert rows(directory) == rows(whole)
    ours, theirs = weights(directory), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((directory / "checkpoints").glob(".*.tmp"))


def killed(seconds: float, corpus: Path, directory: Path) -> bool:
    """Train in a process of its own, and kill it with SIGKILL after that time. Whether it still ran."""
    child = os.fork()
    if not child:
        try:
            run(corpus, directory)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.long) for n in range(3, 30))])
def test_kill_9_at_a_random_moment(number: int, corpus: Path, tmp_path: Path, whole: Path) -> None:
    directory = tmp_path / "run"
    start = time.perf_counter()
    run(corpus, tmp_path / "timed")
    duration = time.perf_counter() - start
    killed(random.Random(number).uniform(0, duration), corpus, directory)
    if (directory / "metrics.csv").exists():
        done = max([int(row["step"]) for row in rows(directory)], default=0)
        saved = [int(path.stem.removeprefix("step_")) for path in step_files(directory / "checkpoints")]
        # An interval, and another one if the kill came while the newest checkpoint was written.
        assert done - max(saved, default=0) < 2 * EVERY
    assert_resumes(corpus, directory, whole)


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` when the training of a step begins."""
    training_step = LanguageModelTask.training_step

    def acting(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        if batch_idx == step - 1:
            action()
        return training_step(task, batch, batch_idx)

    monkeypatch.setattr(LanguageModelTask, "training_step", acting)


def line(function: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending, readable_errors():
        function()
    assert ending.value.code == 2
    (found,) = capsys.readouterr().err.splitlines()
    return found


def test_a_full_disk_during_a_checkpoint(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is written in the background. The run ends at the end of a later step, at most one interval later."""
    directory, full = tmp_path / "run", largest_file(20_000)
    at_step(5, full.__enter__, monkeypatch)
    try:
        found = line(lambda: run(corpus, directory), capsys)
    finally:
        full.__exit__(None, None, None)
    assert found.startswith(f"error: {directory}/checkpoints/step_00000")
    assert found.endswith(".ckpt: File too large.")
    assert [path.name for path in step_files(directory / "checkpoints")] == ["step_0000003.ckpt"]
    monkeypatch.undo()
    assert_resumes(corpus, directory, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
def test_a_run_directory_that_cannot_be_written_any_more(
    corpus: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    at_step(8, lambda: os.seteuid(NOBODY), monkeypatch)
    try:
        found = line(lambda: run(corpus, directory), capsys)
    finally:
        os.seteuid(0)
    assert found.startswith(f"error: {directory}/")
    assert found.endswith(": Permission denied.")
    monkeypatch.undo()
    assert_resumes(corpus, directory, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
def test_a_run_directory_that_can_only_be_read(tmp_path: Path) -> None:
    """It is found before the data are prepared."""
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(InputError, match=r"cannot write the run directory .*run: Permission denied\."):
            RunDirectory(tmp_path / "run")
    finally:
        os.seteuid(0)


def test_a_removed_data_file(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is not continued with other data than it began with, and continues when they are back."""
    texts, directory = tmp_path / "texts", tmp_path / "run"
    shutil.copytree(corpus, texts)
    run(texts, directory, "trainer.max_steps=4", "scheduler=constant")
    removed = texts / "3.txt"
    kept = removed.read_bytes()
    removed.unlink()
    again = ("trainer.max_steps=6", "scheduler=constant", "resume=true")
    found = line(lambda: run(texts, directory, *again), capsys)
    assert "cannot be resumed: the training data" in found
    removed.write_bytes(kept)
    assert run(texts, directory, *again)["steps"] == 6
    shutil.rmtree(texts)
    again = ("trainer.max_steps=8", "scheduler=constant", "resume=true")
    assert str(texts) in line(lambda: run(texts, directory, *again), capsys)


def test_checkpoints_by_the_clock(corpus: Path, tmp_path: Path, whole: Path) -> None:
    """They stop nothing else: the run is the same, and its summary says how long they stopped it."""
    directory = tmp_path / "run"
    summary = run(corpus, directory, "checkpoint.every_minutes=1e-9", "checkpoint.every_n_steps=null")
    assert rows(directory) == rows(whole)
    assert summary["checkpoints"] == 16  # each step is later than the one before
    assert 0 < summary["checkpoint_seconds"] < 16
    seldom = run(corpus, tmp_path / "seldom", "checkpoint.every_minutes=60", "checkpoint.every_n_steps=null")
    assert 1 <= seldom["checkpoints"] <= 4  # validations that are better, and the end
    assert json.loads((directory / "summary.json").read_text())["checkpoints"] == 16
