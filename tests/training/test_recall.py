"""Small versions of the synthetic tasks are learnt on a CPU, through the same command as the large ones."""

from pathlib import Path
from typing import Any

import pytest

from lkda.commands.train import train
from tests.commands.small import composed

SETTINGS = (
    *("trainer=cpu", "callbacks=none", "model=recall", "mixer=kda", "data.batch_size=32", "optimizer.lr=1e-2"),
    *("trainer.val_check_interval=1000", "checkpoint.every_n_steps=1000"),
)
# What is learnt in so many steps, of what guessing gets: an eighth, a sixteenth (of both), an eighth.
TASKS = {
    "palindrome": (("data.letters=8", "data.context=32", "trainer.max_steps=150"), 0.5),
    "mqar_kimi": (("data.vocab_size=32", "data.context=25", "trainer.max_steps=150"), 0.2),
    "mqar_answered": (("data.vocab_size=32", "data.context=32", "trainer.max_steps=150"), 0.2),
    "stack": (("data.stacks=4", "data.elements=8", "data.context=48", "trainer.max_steps=120"), 0.7),
}


def trained(directory: Path, *overrides: str) -> dict[str, Any]:
    return train(composed("train", *SETTINGS, *overrides), directory)


@pytest.mark.slow
def test_a_small_task_is_learnt_in_seconds(tmp_path: Path) -> None:
    """Guessing gets a quarter."""
    sizes = ("data.stacks=2", "data.elements=4", "data.context=24", "data.val_examples=64")
    summary = trained(tmp_path, "data=stack", "model.d_model=32", "trainer.max_steps=50", *sizes)
    assert summary["val/accuracy"] > 0.7


# Tokens, pairs, width and steps.
SOLVED = [
    (24, 2, 64, 250),
    (64, 4, 128, 400),
]


@pytest.mark.long
@pytest.mark.parametrize(("length", "pairs", "width", "steps"), SOLVED)
def test_two_layers_of_kda_solve_recall(length: int, pairs: int, width: int, steps: int, tmp_path: Path) -> None:
    part = f"length: {length}, pairs: {pairs}"
    mixture = (f"data.train=[{{{part}, examples: 10000}}]", f"data.validation=[{{{part}, examples: 500}}]")
    sizes = ("data.vocab_size=64", f"model.d_model={width}", f"trainer.max_steps={steps}")
    assert trained(tmp_path, "data=mqar", *sizes, *mixture)["val/accuracy"] >= 0.99


@pytest.mark.parametrize(
    "task", [pytest.param(name, marks=pytest.mark.slow if name == "mqar_kimi" else pytest.mark.long) for name in TASKS]
)
def test_it_learns(task: str, tmp_path: Path) -> None:
    overrides, least = TASKS[task]
    summary = trained(tmp_path, f"data={task}", "model.d_model=64", "data.val_examples=128", *overrides)
    assert summary["val/accuracy"] > least
