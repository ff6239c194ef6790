"""One training of `lkda.commands.studies.graph_losses`, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from lkda.commands.benchmarks.row_process import answer, end_with_parent
from lkda.commands.run.fit import quiet_libraries
from lkda.commands.train import train
from lkda.io import write_atomically
from lkda.metrics_file import read_metrics
from lkda.shipped import CONFIGS
from lkda.training.task import LanguageModelTask


class LastWeights(L.Callback):
    """At the end of a training, writes a hash of the weights, and whether its steps were replayed CUDA graphs.

    Args:
        path: the JSON file that is written.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        digest = hashlib.sha256()
        for weight in pl_module.parameters():
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        assert isinstance(pl_module, LanguageModelTask)
        found = {"weights": digest.hexdigest(), "graphs": pl_module.replays_graphs}
        write_atomically(Path(self.path), json.dumps(found))


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Train with `request["overrides"]`. Returns the loss of each step, and what `LastWeights` writes."""
    quiet_libraries()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=request["overrides"])
    with tempfile.TemporaryDirectory() as folder:
        end = Path(folder) / "end.json"
        with open_dict(config):
            config.callbacks.last_weights = {
                "_target_": "lkda.commands.studies.graph_losses_row.LastWeights",
                "path": str(end),
            }
        train(config, Path(folder) / "run")
        losses = [
            float(row["train/loss"]) for row in read_metrics(Path(folder) / "run/metrics.csv") if row["train/loss"]
        ]
        return {"losses": losses, **json.loads(end.read_text())}


if __name__ == "__main__":
    end_with_parent()
    answer(measure, sys.argv[1:])
