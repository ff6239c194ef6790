"""An optimiser step is the same however its batch is cut into pieces."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lkda.models.build import build_model
from lkda.targets import IGNORE_INDEX
from lkda.training.task import LanguageModelTask

MODEL = {
    "vocab_size": 16,
    "d_model": 8,
    "num_layers": 1,
    "mlp_hidden": 12,
    "context": 12,
    "mixer": {"pattern": ["kda"], "num_heads": 2},
}
SCALE = {"matrix": 1.0, "embedding": 1.0, "head": 1.0, "vector": 1.0}
ADAMW = {"name": "adamw", "lr": 1e-2, "lr_scale": SCALE, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
CONSTANT = {"name": "constant", "warmup_steps": 2}
STEPS, ROWS, LENGTH = 3, 4, 12


def rows(*, asked: list[int]) -> tuple[Tensor, Tensor]:
    """tokens and targets [STEPS * ROWS, LENGTH]; row n of each step asks its first asked[n] targets."""
    line = torch.randint(16, (STEPS * ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    targets = line[:, 1:].clone()
    for n, count in enumerate(asked * STEPS):
        targets[n, count:] = IGNORE_INDEX
    return line[:, :-1], targets


class Losses(L.Callback):
    """train/loss at the end of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        if (rest[2] + 1) % trainer.accumulate_grad_batches == 0:
            self.seen.append(float(pl_module.step_metrics["train/loss"]))


def trained(*, pieces: int, asked: list[int], flat: bool) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of STEPS steps over the same rows, each step's cut into that many pieces, and the weights after.

    `flat` gives the places of the targets that are asked, as data that ask few do.
    """
    tokens, targets = rows(asked=asked)
    size = ROWS // pieces
    batches: list[dict[str, Any]] = []
    for n in range(0, len(tokens), size):
        batch = {"tokens": tokens[n : n + size], "targets": targets[n : n + size], "cu_seqlens": None}
        if flat:
            batch["target_positions"] = (batch["targets"].flatten() != IGNORE_INDEX).nonzero()[:, 0]
        batches.append(batch)
    torch.manual_seed(1)
    task = LanguageModelTask(
        build_model(MODEL), optimizer=ADAMW, scheduler=CONSTANT, total_steps=STEPS, context=LENGTH, bytes_per_token=None
    )
    losses = Losses()
    L.Trainer(
        accelerator="cpu",
        precision="64-true",  # so that what is left of a difference is no rounding
        max_steps=STEPS,
        accumulate_grad_batches=pieces,
        gradient_clip_val=0.5,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return losses.seen, task.state_dict()


ASKED = [[12, 12, 12, 12], [1, 12, 3, 7], [12, 1, 1, 0], [0, 5, 2, 9]]
# In CI: as many in each piece, and a piece that asks none at the end and at the beginning.
IN_CI = [(0, False), (2, True), (3, False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("asked", "flat"),
    [
        pytest.param(asked, flat, marks=() if (n, flat) in IN_CI else pytest.mark.long, id=f"{asked}-{flat}")
        for flat in (False, True)
        for n, asked in enumerate(ASKED)
    ],
)
def test_one_batch_of_four_rows_two_of_two_and_four_of_one_are_one_step(asked: list[int], flat: bool) -> None:
    whole_losses, whole_weights = trained(pieces=1, asked=asked, flat=flat)
    assert len(whole_losses) == STEPS
    assert len(set(whole_losses)) == STEPS  # it learns
    for pieces in (2, 4):
        losses, weights = trained(pieces=pieces, asked=asked, flat=flat)
        assert losses == pytest.approx(whole_losses, rel=1e-6)  # the loss itself is computed in float32
        for name, weight in whole_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=f"{name}, {pieces} pieces")
