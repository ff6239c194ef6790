"""Resuming with Lightning: the batches of a run that was cut in two are those of a run that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lkda.data.text.datamodule import TextDataModule


class Witness(L.LightningModule):
    """Learns nothing, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["tokens"][0].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"line {n} tells of {n * n} things and {n % 7} more" for n in range(300)))
    return path


def run(lines: Path, *, steps: int, accumulate: int, workers: int = 0, checkpoint: Path | None = None):
    data = TextDataModule(
        source="files",
        paths=[str(lines)],
        context=16,
        batch_size=2,
        vocab_size=300,
        cache_dir=str(lines.parent / "cache"),
        num_workers=workers,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(lines.parent),
    )
    witness = Witness()
    trainer.fit(witness, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer, witness, data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("accumulate", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_a_resumed_run_sees_the_batches_that_the_first_would_have_seen(lines, accumulate, workers):
    _, straight, data = run(lines, steps=12, accumulate=accumulate)
    assert straight.validated == 12 * accumulate // 4 * data.val_batches
    trainer, first, _ = run(lines, steps=5, accumulate=accumulate, workers=workers)
    checkpoint = lines.parent / "half.ckpt"
    trainer.save_checkpoint(checkpoint)
    _, second, _ = run(lines, steps=12, accumulate=accumulate, workers=workers, checkpoint=checkpoint)
    assert first.seen + second.seen == straight.seen
    assert len(straight.seen) == 12 * accumulate
