"""A step whose loss or gradient is not finite ends the run, or changes nothing (trainer.bad_steps=skip)."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.command_line.errors import CommandError
from lkda.commands.train import train
from lkda.training.callbacks.divergence import MOST_SKIPPED
from lkda.training.checkpoint import read_checkpoint
from lkda.training.losses import ModelLoss
from lkda.training.optimizer import build_optimizer
from tests.commands.small import composed, small_run
from tests.training.test_no_waiting import Reads, counted_steps
from tests.training.test_optimizer import ADAMW, MUON

BAD = "bad"


def trained(config: dict[str, Any], steps: list[Any]) -> tuple[list[torch.Tensor], dict[Any, Any]]:
    """The parameters and the optimizer's state after steps with random gradients.

    Args:
        steps: the seed of each step's gradients, or BAD for one with a NaN that is skipped.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    optimizer = build_optimizer(model, config)
    for step in steps:
        generator = torch.Generator().manual_seed(99 if step == BAD else step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == BAD:
                parameter.grad[..., 0] = math.nan
        optimizer.found_inf = torch.tensor(float(step == BAD))  # type: ignore[attr-defined]
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], optimizer.state_dict()["state"]


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("steps", [[BAD, 1, 2, 3], [1, 2, BAD, BAD, 3], [1, 2, 3, BAD]])
def test_a_skipped_step_is_as_if_it_had_not_been(config: dict[str, Any], steps: list[Any]) -> None:
    """Bit for bit, the first step included, whose skipping begins the optimizer's state."""
    parameters, state = trained(config, steps)
    expected_parameters, expected_state = trained(config, [1, 2, 3])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parameters, expected_parameters, strict=True))
    assert state.keys() == expected_state.keys()
    for number, entries in expected_state.items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(state[number][name]), torch.as_tensor(value)), (number, name)


@pytest.fixture
def bad_batches(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers, from 1, of the training batches whose loss becomes NaN. The test fills it."""
    bad: set[int] = set()
    calls = 0
    mean = ModelLoss.mean

    def spoilt(self: ModelLoss, **inputs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = mean(self, **inputs)
        return loss * math.nan if calls in bad else loss

    monkeypatch.setattr(ModelLoss, "mean", spoilt)
    return bad


def run(corpus: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    common = ("sample.max_new_tokens=0", "trainer.limit_val_batches=1", "trainer.val_check_interval=100")
    return train(composed("train", *small_run(corpus, *common, *overrides)), directory)


@pytest.mark.parametrize("options", [(), ("optimizer=muon",), ("trainer.accumulate_grad_batches=2",)])
def test_a_run_goes_on_after_a_bad_step(
    options: tuple[str, ...],
    corpus: Path,
    tmp_path: Path,
    bad_batches: set[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One bad batch spoils its step alone. The step counts, and its row says what it was."""
    pieces = 2 if "trainer.accumulate_grad_batches=2" in options else 1
    bad_batches.add(3 * pieces)
    summary = run(corpus, tmp_path / "run", *options, "trainer.max_steps=6", "trainer.bad_steps=skip")
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", 6, 1)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        losses = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    assert [step for step, loss in losses.items() if not math.isfinite(loss)] == [3]
    assert math.isfinite(summary["val/loss"])
    assert "steps skipped" in capsys.readouterr().out
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


def test_without_it_the_run_stops(corpus: Path, tmp_path: Path, bad_batches: set[int]) -> None:
    bad_batches.add(3)
    with pytest.raises(CommandError, match=r"the loss became NaN or infinite at step 3\. Last good checkpoint: .*0002"):
        run(corpus, tmp_path / "run", "trainer.max_steps=6")


@pytest.mark.slow
def test_skipped_steps_are_counted_over_a_resume(corpus: Path, tmp_path: Path, bad_batches: set[int]) -> None:
    bad_batches |= {2, 5}
    skip = ("trainer.bad_steps=skip", "scheduler=constant")
    run(corpus, tmp_path / "run", *skip, "trainer.max_steps=3")
    summary = run(corpus, tmp_path / "run", *skip, "trainer.max_steps=6", "resume=true")
    assert summary["skipped_steps"] == 2


@pytest.mark.long
def test_a_run_that_only_skips_ends(corpus: Path, tmp_path: Path, bad_batches: set[int]) -> None:
    bad_batches |= set(range(4, 200))
    with pytest.raises(CommandError, match=rf"each of the last {MOST_SKIPPED} steps became NaN or infinite at step 23"):
        run(corpus, tmp_path / "run", "trainer.bad_steps=skip", "trainer.max_steps=60")


@pytest.mark.slow
def test_skipping_reads_nothing_on_the_host(
    corpus: Path, tmp_path: Path, bad_batches: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the guard does, on a CPU in each step and on a GPU in every tenth."""
    bad_batches.add(4)
    reads = Reads()
    options = ("trainer.max_steps=8", "trainer.log_every_n_steps=8", "checkpoint.every_n_steps=8", "mixer=simplified")
    with counted_steps(reads, monkeypatch):
        run(corpus, tmp_path / "run", *options, "trainer.bad_steps=skip")
    assert {file for step, file in reads.found if 2 <= step <= 7} - {"ops"} == {"divergence.py"}


@pytest.mark.parametrize(
    "words",
    [
        ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1"),
    ],
)
def test_what_cannot_skip_says_so(words: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.bad_steps=skip cannot be used with trainer=fsdp: use "):
        train(composed("train", *small_run(corpus), *words, "trainer.bad_steps=skip"), tmp_path / "run")
