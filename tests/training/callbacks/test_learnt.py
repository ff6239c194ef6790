"""A run that ends when its task is learnt."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from lkda.checks import InputError
from lkda.commands.train import train
from lkda.training.callbacks import StopWhenLearnt
from lkda.training.checkpoint import step_files
from tests.commands.small import composed, small_run

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
