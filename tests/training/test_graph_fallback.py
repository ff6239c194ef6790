"""Where a batch cannot be captured, a run goes on without graphs, and says why. A CPU imitates the graphs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.commands.run.console import RunConsole
from lkda.commands.run.prepared_run import PreparedRun
from lkda.commands.train import train
from lkda.training import cuda_graphs
from lkda.training.cuda_graphs import GraphedLoss, _Captured
from lkda.training.task import LanguageModelTask
from tests.commands.small import composed


class Imitation:
    """In place of a graph: computes what it would replay."""

    def __init__(self, owner: GraphedLoss, inputs: dict[str, Tensor | None]) -> None:
        self.owner, self.inputs = owner, inputs
        self.captured: _Captured

    def replay(self) -> None:
        owner = self.owner
        owner._give(owner._summed or [None] * len(owner._parameters))
        self.captured.loss.copy_(owner._forward_backward(self.inputs))
        for own, parameter in zip(self.captured.gradients, owner._parameters, strict=True):
            if own is not None and parameter.grad is not None and own is not parameter.grad:
                own.copy_(parameter.grad)


def captured(self: GraphedLoss, inputs: dict[str, Tensor | None]) -> _Captured:
    self._give(self._summed or [None] * len(self._parameters))
    self._forward_backward(inputs)  # as the warm-up, which adds to the gradients
    if len(self._captured) == cuda_graphs.MOST_GRAPHS - 1 and cuda_graphs.MOST_GRAPHS == 2:
        raise RuntimeError("operation not permitted\nwhen a stream is capturing")
    graph: Any = Imitation(self, inputs)
    gradients = self._summed or [torch.zeros_like(parameter) for parameter in self._parameters]
    graph.captured = _Captured(graph, inputs, torch.zeros(()), list(gradients))
    return graph.captured


WORDS = (
    *("debug=fast", "data=mqar", "trainer=cpu", "mixer=simplified", "model.num_layers=1"),
    *("trainer.max_steps=4", "trainer.val_check_interval=4", "checkpoint.every_n_steps=4"),
    "data.train=[{length: 16, pairs: 2, examples: 16}, {length: 24, pairs: 2, examples: 16}]",
)


def losses(directory: Path, pieces: int) -> list[float]:
    """Of a run whose batches are of two lengths in random order."""
    train(composed("train", *WORDS, f"trainer.accumulate_grad_batches={pieces}"), directory)
    with open(directory / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def without_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[float]]:
    return cache(lambda pieces: losses(tmp_path_factory.mktemp("plain") / "run", pieces))


@pytest.mark.parametrize(
    ("most", "why"),
    [(16, None), (1, "batches have more than 1 shapes"), (2, "operation not permitted when a stream is capturing")],
)
@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_run_goes_on_and_says_why_in_one_line(
    pieces: int,
    most: int,
    why: str | None,
    without_graphs: Callable[[int], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also in the middle of a step, whose earlier pieces count."""
    plain, want = LanguageModelTask.__init__, without_graphs(pieces)

    def with_graphs(self: LanguageModelTask, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **{**options, "cuda_graphs": True})

    monkeypatch.setattr(LanguageModelTask, "__init__", with_graphs)
    monkeypatch.setattr(GraphedLoss, "_captured_of", captured)
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", most)
    assert losses(tmp_path / "run", pieces) == pytest.approx(want, abs=1e-6)
    said = [line for line in capsys.readouterr().out.splitlines() if "CUDA graphs" in line]
    assert said == ([] if why is None else [f"without torch.compile and CUDA graphs: {why}"])


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile fails, as where it finds no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException

    def compiled(*arguments: Any, **options: Any) -> Any:
        def fails(*arguments: Any) -> None:
            raise TorchDynamoException("no C++ compiler\nwas found")

        return fails

    monkeypatch.setattr(torch, "compile", compiled)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_a_run_goes_on_unless_it_must_compile(
    without_graphs: Callable[[int], list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(InputError, match=r"^torch.compile failed: no C\+\+ compiler was found. Use compile=false.$"):
        train(composed("train", *WORDS, "compile=true"), tmp_path / "must")
    plain, want = LanguageModelTask.__init__, without_graphs(1)

    def automatic(self: LanguageModelTask, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **{**options, "compile": "auto"})

    monkeypatch.setattr(LanguageModelTask, "__init__", automatic)
    assert losses(tmp_path / "run", 1) == want
    assert capsys.readouterr().out.count("without torch.compile: no C++ compiler was found\n") == 1


ANOMALY = "which trainer.detect_anomaly does not allow"
PARTS = "without torch.compile, which context_parallel does not allow"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"detect_anomaly": True}, [f"without torch.compile, {ANOMALY}", f"without CUDA graphs, {ANOMALY}"]),
        ({"strategy": "ddp", "context_parallel": 2}, [PARTS]),
    ],
)
def test_a_run_that_cannot_have_both_says_so_at_its_start(
    changes: dict[str, Any], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    starting(capsys, changes, source="files", subsets=(), said=said)


@pytest.mark.parametrize(
    ("strategy", "pieces", "source", "said"),
    [
        ("single", 4, "mqar", None),
        ("ddp", 1, "files", None),
        ("fsdp", 1, "files", None),
        ("ddp", 4, "files", "ddp with trainer.accumulate_grad_batches"),
        ("fsdp", 1, "mqar", "fsdp with data=mqar"),
    ],
)
def test_processes_have_graphs_if_all_batches_are_alike(
    strategy: str, pieces: int, source: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    subsets = ({"length": 64},) if source == "mqar" else ()
    expected = [] if said is None else [f"without CUDA graphs, which {said} does not allow"]
    starting(capsys, {"strategy": strategy, "accumulate_grad_batches": pieces}, source, subsets, expected)


def starting(capsys: Any, changes: dict[str, Any], source: str, subsets: tuple[Any, ...], said: list[str]) -> None:
    """Checks what a run with these settings of the trainer says."""
    usual = {"strategy": "single", "context_parallel": 1, "accumulate_grad_batches": 1, "detect_anomaly": False}
    plan: Any = SimpleNamespace(trainer=SimpleNamespace(**usual | changes))
    data: Any = SimpleNamespace(source=source, val_subsets=subsets)
    prepared = PreparedRun(
        plan=plan,
        data=data,
        model_config={},
        metadata={},
        total_steps=1,
        checkpoint=None,
        first_step=0,
        steps_since_row=None,
    )
    RunConsole(SimpleNamespace())._print_what_is_not_compiled(prepared)  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines() == [f"compile=auto: {line}" for line in said]
