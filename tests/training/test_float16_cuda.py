"""Training with a loss scale on a GPU, against bfloat16, which needs none."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def steps(corpus: Path, directory: Path, precision: str) -> list[dict[str, str]]:
    """The rows of 20 steps of model=tiny."""
    pytest.importorskip("lightning", reason="tests of kernels run where there is nothing but torch")
    from lkda.commands.train import train
    from tests.commands.small import composed

    words = ("data=files", f"data.paths=[{corpus}]", "model=tiny", "model.vocab_size=300", "trainer=gpu")
    short = ("trainer.max_steps=20", "trainer.log_every_n_steps=1", "callbacks=none", "sample.max_new_tokens=0")
    train(composed("train", *words, *short, "data.context=64", f"trainer.precision={precision}"), directory)
    assert json.loads((directory / "summary.json").read_text())["precision"] == precision
    with open(directory / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def test_clipping_sees_gradients_of_their_true_size(corpus: Path, tmp_path: Path) -> None:
    """They are multiplied by 65536 before they are unscaled."""
    scaled = steps(corpus, tmp_path / "scaled", "16-mixed")
    true = steps(corpus, tmp_path / "true", "bf16-mixed")
    assert [int(row["step"]) for row in scaled] == list(range(1, 21))
    assert all(math.isfinite(float(row["train/loss"])) for row in scaled)
    assert float(scaled[-1]["train/loss"]) < float(scaled[0]["train/loss"]) - 0.3
    # The first step whose gradients fit into float16: those before it are left out, and the scale halved.
    finite = [math.isfinite(float(row["train/grad_norm"])) for row in scaled]
    assert any(finite)
    first = finite.index(True)
    assert first == 0 or not any(finite[:first])
    assert float(scaled[first]["train/grad_norm"]) == pytest.approx(float(true[0]["train/grad_norm"]), rel=0.2)
