"""Signals, divergence and the model's table."""

import os
import signal
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lkda.models.build import build_model
from lkda.training.callbacks import DivergedError, DivergenceGuard, InterruptedRunError, StopRequest
from lkda.training.callbacks.divergence import require_finite
from lkda.training.callbacks.overview import overview
from lkda.training.callbacks.progress import describe


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_is_noted_and_a_second_ends(signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signum)
    with StopRequest() as request:
        assert request.signum is None
        os.kill(os.getpid(), signum)
        assert request.signum == signum
        sent: list[Any] = []
        handler: Any = signal.getsignal(signum)
        monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
        handler(signum, None)
        assert sent == [(os.getpid(), signum)]
        assert signal.getsignal(signum) == signal.SIG_DFL  # so that the one just sent ends the process
    assert signal.getsignal(signum) == before


def test_exit_codes_are_those_of_a_shell() -> None:
    assert InterruptedRunError(signal.SIGINT, 5).exit_code == 130
    assert InterruptedRunError(signal.SIGTERM, 5).exit_code == 143


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_bad_loss_is_named(bad: float) -> None:
    guard = DivergenceGuard()
    losses = [3.0, 2.0, bad, 1.0]

    def step(number: int) -> None:
        trainer: Any = SimpleNamespace(global_step=number)
        model: Any = None
        guard.on_train_batch_end(trainer, model, {"loss": torch.tensor(losses[number - 1])}, None, number)

    step(1)
    step(2)
    with pytest.raises(DivergedError, match="the loss became NaN or infinite at step 3"):
        step(3)
    # On a GPU, which is asked less often, the first is still the one that is named.
    with pytest.raises(DivergedError, match="at step 3"):
        step(4)


def test_a_bad_validation_loss_stops_too() -> None:
    trainer: Any = SimpleNamespace(global_step=9, callback_metrics={"val/loss": torch.tensor(float("nan"))})
    model: Any = None
    with pytest.raises(DivergedError, match="the validation loss became NaN or infinite at step 9"):
        DivergenceGuard().on_validation_end(trainer, model)


def test_parameters_must_be_finite_to_be_saved() -> None:
    layer = torch.nn.Linear(3, 3)
    require_finite(layer, step=7)
    with torch.no_grad():
        layer.bias[1] = float("nan")
    with pytest.raises(DivergedError, match="a parameter became NaN or infinite at step 7"):
        require_finite(layer, step=7)


@pytest.mark.parametrize("mlp_hidden", [0, 12])
def test_the_overview_adds_up(mlp_hidden: int) -> None:
    mixer = {"pattern": ["kda", "kda", "softmax"], "num_heads": 2}
    model = build_model(
        {"vocab_size": 16, "d_model": 8, "num_layers": 6, "mlp_hidden": mlp_hidden, "context": 32, "mixer": mixer}
    )
    out = StringIO()
    Console(file=out, width=120).print(overview(model))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if "│" in line]
    numbers = [[int(cell.replace(",", "")) for cell in row[1:] if cell and cell[0].isdigit()] for row in rows]
    assert {row[0] for row in rows} >= {"4 x KimiDeltaAttention", "2 x SoftmaxAttention", "embedding 16 x 8", "head"}
    whole = numbers[-1]
    assert whole == [model.num_parameters(), model.state_bytes(32), round(model.flops_per_token(32))]
    by_part = [row[1:] for row in rows[:-1]]
    parameters = sum(int(row[0].replace(",", "")) for row in by_part if row[0][0].isdigit())
    norms = model.num_parameters() - parameters
    assert norms == 8 * (1 + (2 if mlp_hidden else 1) * 6)


def test_a_row_is_described_in_one_line() -> None:
    row = {"train/loss": 3.14159, "train/bits_per_byte": 1.5, "lr": 0.1, "tokens_per_s": 12345.6}
    assert describe(row) == "loss 3.142  1.500 bpb  12,346 tok/s"
