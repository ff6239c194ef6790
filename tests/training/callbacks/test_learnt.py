"""A run that ends when its task is learnt."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lkda.checks import InputError
from lkda.commands.train import train
from lkda.training.callbacks import StopWhenLearnt
from lkda.training.checkpoint import step_files
from tests.commands.small import composed, rows, small_run

SMALL = ("data=palindrome", "data.context=32", "data.letters=2", "data.val_examples=4", "data.batch_size=2")
SMALL += ("model=recall", "model.d_model=32", "trainer=cpu", "callbacks=none", "scheduler.warmup_steps=1")
SMALL += ("trainer.max_steps=6", "trainer.val_check_interval=2")


def callback(accuracy: float) -> str:
    return f"+callbacks.learnt={{_target_: lkda.training.callbacks.StopWhenLearnt, accuracy: {accuracy}}}"


@pytest.mark.parametrize(("accuracy", "steps"), [(0.01, 2), (1.0, 6)])
def test_it_ends_after_the_first_validation_that_is_good_enough(accuracy: float, steps: int, tmp_path: Path) -> None:
    """Half of the answers are right by chance."""
    summary = train(composed("train", *SMALL, callback(accuracy)), tmp_path)
    assert (summary["status"], summary["steps"]) == ("finished", steps)
    assert summary["val/accuracy"] > 0.01
    with open(tmp_path / "metrics.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)][-1] == steps
    assert step_files(tmp_path / "checkpoints")[-1].name == f"step_000000{steps}.ckpt"


def test_text_has_no_accuracy(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="StopWhenLearnt needs data with an accuracy"):
        train(composed("train", *small_run(corpus), callback(0.9)), tmp_path)


@pytest.mark.parametrize("accuracy", [0, 1.5, "high", True])
def test_a_share_that_is_none_is_refused(accuracy: object) -> None:
    with pytest.raises(InputError, match="above 0 and at most 1"):
        StopWhenLearnt(accuracy)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended at step 2 of 6. Its accuracy is about a half."""
    directory = tmp_path_factory.mktemp("learnt") / "run"
    train(composed("train", *SMALL, callback(0.01)), directory)
    return directory


def contents(directory: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def resumed(directory: Path, *overrides: str) -> dict[str, Any]:
    return train(composed("train", *SMALL, *overrides, "resume=true"), directory)


@pytest.mark.parametrize("changes", [(), ("trainer.max_steps=20",), ("trainer.max_steps=1",)])
def test_there_is_nothing_to_do_in_a_run_that_has_learnt(
    changes: tuple[str, ...], learnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps change nothing: with them the run would have ended at the same validation."""
    before, summary = contents(learnt), json.loads((learnt / "summary.json").read_text())
    assert resumed(learnt, callback(0.02), *changes) == summary
    assert contents(learnt) == before
    said = capsys.readouterr().out.strip()
    accuracy = summary["val/accuracy"]
    longer = "set trainer.max_steps to more than 2, and " if changes == ("trainer.max_steps=1",) else ""
    assert said == (
        f"{learnt} holds a finished run of 2 steps. Its accuracy of {accuracy} has reached "
        "callbacks.learnt.accuracy=0.02, which ends a run of any length: nothing to do. To train on, "
        f"{longer}set callbacks.learnt.accuracy to more than {accuracy}, or leave this callback out."
    )


def test_no_accuracy_is_higher_than_all(learnt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = shutil.copytree(learnt, tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").write_text(json.dumps(summary | {"val/accuracy": 1.0}))
    resumed(directory, callback(1.0))
    assert capsys.readouterr().out.endswith("nothing to do. To train on, leave this callback out.\n")


@pytest.mark.parametrize("overrides", [(callback(1.0),), ()])
def test_it_trains_on_for_more_accuracy(overrides: tuple[str, ...], learnt: Path, tmp_path: Path) -> None:
    """A higher accuracy, or none at which the run ends."""
    directory = shutil.copytree(learnt, tmp_path / "run")
    assert resumed(directory, *overrides)["steps"] == 6
    straight = train(composed("train", *SMALL), tmp_path / "straight")
    assert rows(directory) == rows(tmp_path / "straight")
    assert straight["val/loss"] == json.loads((directory / "summary.json").read_text())["val/loss"]


def test_more_steps_where_the_accuracy_was_not_reached(tmp_path: Path) -> None:
    train(composed("train", *SMALL, callback(1.0)), tmp_path)
    assert resumed(tmp_path, callback(1.0), "trainer.max_steps=8")["steps"] == 8


@pytest.mark.parametrize("status", [None, "interrupted"])
def test_a_process_that_was_stopped_before_its_summary(status: str | None, learnt: Path, tmp_path: Path) -> None:
    """It was killed after the last checkpoint, or a signal came during the last validation."""
    directory = shutil.copytree(learnt, tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    (directory / "summary.json").unlink()
    if status is not None:
        (directory / "summary.json").write_text(json.dumps(summary | {"status": status}))
    found = resumed(directory, callback(0.01))
    assert found == summary | {"checkpoint_seconds": found["checkpoint_seconds"], "checkpoints": found["checkpoints"]}
    assert rows(directory) == rows(learnt)
