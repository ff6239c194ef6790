"""Runs of scripts/train.py that replay CUDA graphs have the losses of runs that do not, to rounding."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there are no graphs"),
]

STEPS = 24
# In nats per token: the largest difference of a step, the mean over all steps, and the difference of the first step.
LARGEST, MEAN, FIRST = 0.02, 0.002, 1e-3

Run = Callable[..., list[float]]


@pytest.fixture
def run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Trains with a validation in between, and returns the loss of each step. Says whether it must replay graphs."""
    pytest.importorskip("lightning", reason="tests of kernels run where there is nothing but torch")
    from lkda.commands.train import train
    from tests.commands.small import composed

    text = ("data=files", f"data.paths=[{corpus}]", "data.context=64", "model.vocab_size=300")
    short = ("trainer.log_every_n_steps=1", "callbacks=none", "sample.max_new_tokens=0", "checkpoint.every_n_steps=100")

    def losses(*words: str, graphs: bool, name: str = "") -> list[float]:
        directory = tmp_path / (name or f"{'graphs' if graphs else 'plain'}")
        given = {word.partition("=")[0] for word in words}
        usual = [*(text if "data" not in given else ()), *short]
        usual += [f"trainer.max_steps={STEPS}"] if "trainer.max_steps" not in given else []
        usual += ["model=tiny"] if not given & {"init_from", "model"} else []
        if "init_from" in given:
            usual.remove("model.vocab_size=300")
        compile = "compile=auto" if graphs else "compile=false"
        train(composed("train", "trainer=gpu", "trainer.val_check_interval=10", compile, *usual, *words), directory)
        assert "without torch.compile and CUDA graphs" not in capsys.readouterr().out
        with open(directory / "metrics.csv", newline="") as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]

    return losses


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of losses that were replayed, in one entry."""
    from lkda.training.cuda_graphs import GraphedLoss

    counted, call = [0], GraphedLoss.__call__

    def counting(self: GraphedLoss, *arguments: Any, **options: Any) -> torch.Tensor:
        counted[0] += 1
        return call(self, *arguments, **options)

    monkeypatch.setattr(GraphedLoss, "__call__", counting)
    return counted


def near(found: list[float], want: list[float], *, learns: bool = True) -> None:
    differences = [abs(a - b) for a, b in zip(found, want, strict=True)]
    assert differences[0] < FIRST
    assert max(differences) < LARGEST
    assert statistics.fmean(differences) < MEAN
    assert not learns or want[-1] < want[0] - 0.1


MIXERS = ("kda", "simplified", "softmax", "mla", "kda_mla_3to1", "kda_softmax_1to1", "conv_kda", "conv_softmax")
LENGTHS = "data.train=[{length: 64, pairs: 4, examples: 2000}, {length: 128, pairs: 8, examples: 2000}]"
OPTIONS = {
    **{mixer: (f"mixer={mixer}",) for mixer in MIXERS},
    "accumulation": ("trainer.accumulate_grad_batches=3",),
    "checkpointing": ("checkpointing=block",),
    "float32": ("trainer.precision=32-true",),
    "float16": ("trainer.precision=16-mixed",),
    "muon": ("optimizer=muon",),
    "skip": ("trainer.bad_steps=skip",),
    "ddp": ("trainer.strategy=ddp",),
    "fsdp": ("trainer.strategy=fsdp",),
    "shapes": (
        "data=mqar",
        LENGTHS,
        "data.batch_size=32",
        "model.vocab_size=null",
        "trainer.accumulate_grad_batches=2",
    ),
    "palindrome": ("data=palindrome", "data.batch_size=32", "model.vocab_size=null"),
    "stack": ("data=stack", "data.batch_size=32", "model.vocab_size=null"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_change_no_loss(options: tuple[str, ...], run: Run, replays: list[int]) -> None:
    want = run(*options, graphs=False)
    assert not replays[0]
    found = run(*options, graphs=True)
    pieces = {"trainer.accumulate_grad_batches=3": 3, "trainer.accumulate_grad_batches=2": 2}
    assert replays[0] == STEPS * max((pieces.get(option, 1) for option in options), default=1)
    if "trainer.precision=16-mixed" in options:  # the first steps overflow, and the loss scale is halved
        differences = [abs(a - b) for a, b in zip(found, want, strict=True)]
        assert max(differences) < LARGEST
    else:
        synthetic = any(option.startswith("data=") for option in options)  # it learns nothing in so few steps
        near(found, want, learns=not synthetic)


def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(run: Run, replays: list[int]) -> None:
    want = run(graphs=True, name="whole")
    run("trainer.max_steps=10", graphs=True, name="stopped")
    found = run("resume=true", graphs=True, name="stopped")
    assert len(found) == STEPS
    near(found, want)
    assert replays[0] == STEPS + 10 + STEPS - 10


def test_a_run_from_exported_weights(run: Run, replays: list[int], tmp_path: Path) -> None:
    from lkda.commands.export import export
    from tests.commands.small import composed

    run(graphs=True, name="first")
    out = export(composed("export", f"ckpt={tmp_path}/first", f"out={tmp_path}/out"))
    start = (f"init_from={out}", "optimizer.lr=1e-3")
    near(run(*start, graphs=True), run(*start, graphs=False))
