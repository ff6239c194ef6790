"""With a loss scale, clipping sees gradients of their true size."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from lkda.models.build import build_model
from lkda.training.task import LanguageModelTask
from tests.training.test_optimizer import ADAMW, MUON
from tests.training.test_step_mean import CONSTANT, LENGTH, MODEL, ROWS, STEPS, rows

LARGEST_NORM = 0.5


def norms(
    monkeypatch: pytest.MonkeyPatch, optimizer: dict[str, Any], *, scale: float | None, pieces: int
) -> tuple[list[float], list[float], torch.nn.Module]:
    """The gradients' norms before and after clipping in each step, and the trained model; float16 with a scale."""
    before, after = [], []
    clip = LanguageModelTask.configure_gradient_clipping

    def witnessed(self: LanguageModelTask, *arguments: Any, **options: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        before.append(float(torch.nn.utils.get_total_norm(gradients)))
        clip(self, *arguments, **options)
        after.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(LanguageModelTask, "configure_gradient_clipping", witnessed)
    tokens, targets = rows(asked=[LENGTH] * ROWS)
    size = ROWS // pieces
    batches = [
        {"tokens": tokens[n : n + size], "targets": targets[n : n + size], "cu_seqlens": None}
        for n in range(0, len(tokens), size)
    ]
    torch.manual_seed(1)
    task = LanguageModelTask(
        build_model(MODEL),
        optimizer=optimizer,
        scheduler=CONSTANT,
        total_steps=STEPS,
        context=LENGTH,
        bytes_per_token=None,
    )
    plugins = []
    if scale is not None:
        plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))]
    L.Trainer(
        accelerator="cpu",
        plugins=plugins,
        max_steps=STEPS,
        accumulate_grad_batches=pieces,
        gradient_clip_val=LARGEST_NORM,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    monkeypatch.undo()
    return before, after, task.model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_gradients_are_unscaled_before_they_are_clipped(
    optimizer: dict[str, Any], pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, _, straight = norms(monkeypatch, optimizer, scale=None, pieces=pieces)
    seen, clipped, scaled = norms(monkeypatch, optimizer, scale=2.0**12, pieces=pieces)
    assert min(true) > LARGEST_NORM  # clipping does something
    assert seen == pytest.approx(true, rel=0.02)
    assert clipped == pytest.approx([LARGEST_NORM] * STEPS, rel=1e-3)
    assert distance(scaled, straight) < 0.1 * distance(straight, untrained())


def untrained() -> torch.nn.Module:
    torch.manual_seed(1)
    return build_model(MODEL)


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """Between all weights of two models."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return float(sum((a - b).detach().square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.filterwarnings("ignore")
def test_a_step_whose_gradients_overflow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale too large for float16 makes infinite gradients, which must not reach the weights."""
    seen, _, model = norms(monkeypatch, ADAMW, scale=2.0**40, pieces=1)
    assert not all(torch.tensor(seen).isfinite())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
