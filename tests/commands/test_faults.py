"""The faults that docs/guides/long_runs.md lists: what the user sees, and that the run continues as if it had not been.

Other files test some of them: damaged checkpoints (tests/training/test_damaged_checkpoints.py), signals and kills at
every write (test_resume.py), a killed process of several (test_many_processes.py), W&B
(tests/training/test_wandb_logger.py) and changed data (test_identity.py).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lkda.checks import InputError
from lkda.commands.command_line.errors import readable_errors
from lkda.commands.run.run_directory import RunDirectory
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


def forked(action: Callable[[], Any]) -> int:
    """A process that runs `action` and ends."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return child


def was_killed(child: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(owner: Any, name: str, call: int, seconds: float) -> None:
    """Let this process kill itself that many seconds after the given call of a function has begun; 0: before it
    begins."""
    original, calls = getattr(owner, name), itertools.count(1)

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            if seconds:
                threading.Timer(seconds, die).start()
            else:
                die()
        return original(*args, **kwargs)

    setattr(owner, name, function)  # in a process of its own


# For each place where a process is killed: the function that is running, the number of its calls in the run, and the
# most seconds after its beginning.
MOMENTS: dict[str, tuple[Any, str, int, float]] = {
    "a checkpoint is written": (torch, "save", 5, 0.01),
    "a checkpoint is renamed": (os, "replace", 12, 0.0),
    "a validation": (LanguageModelTask, "validation_step", 3, 0.02),
    "the first step": (LanguageModelTask, "training_step", 1, 0.03),
    "any step": (LanguageModelTask, "training_step", 15, 0.03),
}


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        pytest.param(n, moment, marks=pytest.mark.long if n >= 3 else pytest.mark.slow)
        for n, moment in zip(range(30), itertools.cycle([*MOMENTS, "anywhere"]))
    ],
)
def test_kill_9_at_a_random_moment(number: int, moment: str, corpus: Path, tmp_path: Path, whole: Path) -> None:
    """The resumed run has the losses and the weights of one that was not killed, bit for bit."""
    directory, draw = tmp_path / "run", random.Random(number)
    if moment == "anywhere":
        child = forked(lambda: run(corpus, directory))
        time.sleep(draw.uniform(0, 3))
        os.kill(child, signal.SIGKILL)
        was_killed(child)
    else:
        owner, name, calls, most = MOMENTS[moment]
        call, seconds = draw.randint(1, calls), draw.uniform(0, most)

        def action() -> None:
            dies_in(owner, name, call, seconds)
            run(corpus, directory)

        assert was_killed(forked(action))
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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder of a file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_becomes_full(
    corpus: Path, small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When there is room again, the run continues."""
    directory, other = small_disk / "run", small_disk / "other"

    def fill() -> None:
        with suppress(OSError), open(other, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at_step(5, fill, monkeypatch)
    found = line(lambda: run(corpus, directory), capsys)
    assert found.startswith(f"error: {directory}/")
    assert found.endswith(": No space left on device.")
    monkeypatch.undo()
    other.unlink()
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


@pytest.mark.slow
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
    run(texts, tmp_path / "straight", "trainer.max_steps=6", "scheduler=constant")
    ours, theirs = weights(directory), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(texts)
    again = ("trainer.max_steps=8", "scheduler=constant", "resume=true")
    assert str(texts) in line(lambda: run(texts, directory, *again), capsys)


@pytest.mark.slow
def test_a_token_file_that_becomes_shorter_during_the_run(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped into memory. The system ends a process that reads where there is no file any more."""
    file, directory = tmp_path / "tokens.npy", tmp_path / "run"
    np.save(file, np.random.default_rng(0).integers(0, 200, 50_000).astype(np.uint16))
    content = file.read_bytes()
    words = ("debug=fast", "data=tokens", f"data.paths=[{file}]", f"data.tokenizer_path={whole / 'tokenizer.json'}")
    words += ("trainer=cpu", "scheduler=constant", *OPTIONS)

    def trained(path: Path, *overrides: str) -> dict[str, Any]:
        return train(composed("train", *words, *overrides), path)

    with monkeypatch.context() as within:
        at_step(8, lambda: os.truncate(file, 100), within)
        child = forked(lambda: trained(directory))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS
    with pytest.raises(InputError, match=r"tokens\.npy is not a token file that can be read"):
        trained(directory, "resume=true")
    file.write_bytes(content)
    trained(directory, "resume=true")
    trained(tmp_path / "straight")
    assert rows(directory) == rows(tmp_path / "straight")


@pytest.mark.slow
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
