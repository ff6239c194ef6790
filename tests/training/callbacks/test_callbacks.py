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
from lkda.training.callbacks.time_left import TimeLeft, announcement, duration, validations_left


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
    assert InterruptedRunError(signal.SIGUSR1, 5).exit_code == 138


def test_a_sigterm_after_the_warning_of_slurm_does_not_end_the_saving() -> None:
    """Slurm sends SIGUSR1 first, and SIGTERM at the time limit."""
    with StopRequest() as request:
        for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), signum)
        assert request.signum == signal.SIGTERM


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_first_bad_loss_is_named(bad: float, pieces: int) -> None:
    """By the step that it belongs to, also where that has batches still to come."""
    guard = DivergenceGuard()
    model: Any = None

    def batch(number: int, loss: float) -> None:
        trainer: Any = SimpleNamespace(global_step=(number + 1) // pieces, accumulate_grad_batches=pieces)
        guard.on_train_batch_end(trainer, model, {"mean": torch.tensor(loss)}, None, number)

    for number in range(2 * pieces):
        batch(number, 3.0)
    with pytest.raises(DivergedError, match="the loss became NaN or infinite at step 3"):
        batch(2 * pieces, bad)
    # On a GPU, which is asked less often, the first is still the one that is named.
    with pytest.raises(DivergedError, match="at step 3"):
        batch(3 * pieces, 1.0)


def test_a_bad_validation_loss_stops_too() -> None:
    trainer: Any = SimpleNamespace(global_step=9, callback_metrics={"val/loss": torch.tensor(float("nan"))})
    model: Any = None
    with pytest.raises(DivergedError, match="the validation loss became NaN or infinite at step 9"):
        DivergenceGuard().on_validation_end(trainer, model)


@pytest.mark.parametrize("after", [1.5, float("nan")])
def test_a_validation_names_the_step_that_a_gpu_has_not_been_asked_for_yet(
    after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of the last step of a run, after which nothing else asks."""
    guard, model = DivergenceGuard(every_n_steps=100), Any
    monkeypatch.setattr(guard, "_read", lambda value, step: None)
    for step, loss in enumerate([3.0, float("nan"), 3.0], 1):
        trainer: Any = SimpleNamespace(global_step=step, accumulate_grad_batches=1)
        guard.on_train_batch_end(trainer, model, {"mean": torch.tensor(loss)}, None, step)  # type: ignore[arg-type]
    trainer = SimpleNamespace(global_step=3, callback_metrics={"val/loss": torch.tensor(after)})
    with pytest.raises(DivergedError, match=r"^the loss became NaN or infinite at step 2$"):
        guard.on_validation_end(trainer, model)  # type: ignore[arg-type]


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
    assert numbers[-1] == [model.num_parameters(), model.state_bytes(32), round(model.flops_per_token(32))]
    by_part = [row[1:] for row in rows[:-1]]
    parameters = sum(int(row[0].replace(",", "")) for row in by_part if row[0][0].isdigit())
    assert parameters == model.num_parameters()
    (norms,) = (numbers[n] for n, row in enumerate(rows) if row[0] == "norms")
    assert norms == [8 * (1 + (2 if mlp_hidden else 1) * 6)]


def test_a_row_is_described_in_one_line() -> None:
    row = {"train/loss": 3.14159, "train/bits_per_byte": 1.5, "lr": 0.1, "tokens_per_s": 12345.6}
    assert describe(row) == "loss 3.142  1.500 bpb  12,346 tok/s"
    row |= {"tokens_per_s": 927557.0, "tflops_per_s": 243.4, "mfu": 0.246, "peak_memory_gib": 4.56, "val/loss": 3.2}
    of_a_gpu = "927,557 tok/s  243 TFLOP/s  25% mfu  4.6 GiB"
    assert describe(row) == f"loss 3.142  1.500 bpb  {of_a_gpu}  val 3.200"


def trainer_at(step: int, *, max_steps: int, every: int, pieces: int = 1) -> Any:
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        accumulate_grad_batches=pieces,
        val_check_batch=every * pieces,
        num_val_batches=[30],
    )


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize(
    ("step", "max_steps", "every", "left"),
    [(0, 800, 400, 2), (400, 800, 400, 1), (401, 800, 400, 1), (8, 801, 400, 3), (8, 100, 400, 1), (100, 100, 400, 1)],
)
def test_validations_left_are_counted(step: int, max_steps: int, every: int, left: int, pieces: int) -> None:
    assert validations_left(trainer_at(step, max_steps=max_steps, every=every, pieces=pieces)) == left


def test_the_time_left_is_of_steps_and_validations() -> None:
    left = TimeLeft()
    trainer = trainer_at(8, max_steps=108, every=50, pieces=2)
    assert left.seconds(trainer) is None
    left.step_seconds = 2.0
    # 100 steps of 2 s, and after 50, 100 and 108 steps 30 batches at a third of a batch of 1 s.
    assert left.seconds(trainer) == pytest.approx(200 + 3 * 10)
    left.validation_seconds = 7.0
    assert left.seconds(trainer) == pytest.approx(200 + 3 * 7)


def test_a_long_run_is_told_how_to_be_shorter() -> None:
    speed = {"step_seconds": 0.4, "tokens_per_step": 1000}
    line = announcement(step=8, max_steps=808, validations=2, seconds=330.0, **speed)
    assert line.startswith("about 5 min 30 s to go: 800 steps at 2,500 tokens/s, 2 validations. For a shorter run: ")
    # 800 steps x 120 s / 330 s more than the 8.
    assert "trainer.max_steps=298 (or trainer.max_tokens=298000) takes about 2 min;" in line
    short = announcement(step=8, max_steps=20, validations=1, seconds=4.2, **speed)
    assert short == "about 4 s to go: 12 steps at 2,500 tokens/s, 1 validation."


def test_durations_read_as_one_says_them() -> None:
    said = {
        0.4: "0 s",
        59: "59 s",
        61: "1 min 1 s",
        120: "2 min",
        600: "10 min",
        3599: "59 min 59 s",
        7260: "2 h 1 min",
    }
    assert {seconds: duration(seconds) for seconds in said} == said
