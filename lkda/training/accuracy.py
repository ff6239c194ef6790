"""How many of the asked tokens, and of the whole sequences, a model gets right, for each part of the validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassExactMatch

from lkda.models.lm import LanguageModel

IGNORED = -100
# Logits are made for so many places at a time: 256 MB of them at 8192 words.
PLACES_AT_ONCE = 8192


def column(metric: str, part: Mapping[str, int]) -> str:
    """The column of metrics.csv that holds `metric` of a part: val/accuracy/length_64_pairs_4."""
    return f"val/{metric}/" + "_".join(f"{name}_{value}" for name, value in part.items() if name != "examples")


METRICS = ("accuracy", "sequence_accuracy", "loss")


class PartMetrics(nn.Module):
    """Accuracy by token (of those that are asked), by sequence (all of them right), and loss in nats, part by part.

    Args:
        parts: of the validation, as {"length": 64, "pairs": 4}.
        vocab_size: of the model.
    """

    def __init__(self, parts: Sequence[Mapping[str, int]], *, vocab_size: int) -> None:
        super().__init__()
        self.parts = list(parts)
        kept: dict[str, Any] = {"num_classes": vocab_size, "ignore_index": IGNORED, "validate_args": False}
        self.accuracy = nn.ModuleList(MulticlassAccuracy(average="micro", **kept) for _ in parts)
        self.sequence_accuracy = nn.ModuleList(MulticlassExactMatch(**kept) for _ in parts)
        self.loss = nn.ModuleList(MeanMetric() for _ in parts)

    def measure(self, model: LanguageModel, batch: Mapping[str, Any]) -> None:
        """Take in the model's predictions on a validation batch {tokens, targets, asked, part}."""
        part, targets = batch["part"], batch["targets"]
        hidden, wanted = model.hidden(batch["tokens"]).flatten(0, 1), targets.flatten()
        predicted = torch.zeros_like(wanted)
        for places in batch["asked"].split(PLACES_AT_ONCE):
            logits = model.lm_head(hidden[places]).float()
            predicted[places] = logits.argmax(-1)
            self.loss[part].update(F.cross_entropy(logits, wanted[places]), weight=len(places))
        predicted = predicted.view_as(targets)
        self.accuracy[part].update(predicted, targets)
        self.sequence_accuracy[part].update(predicted, targets)

    def compute(self) -> dict[str, Tensor]:
        """By column of metrics.csv: of each part that was seen, and their means as val/accuracy ...; resets."""
        found, means = {}, {}
        for metric in METRICS:
            seen = []
            for part, measured in zip(self.parts, getattr(self, metric), strict=True):
                if measured.update_called:
                    found[column(metric, part)] = measured.compute()
                    seen.append(found[column(metric, part)])
                measured.reset()
            means[f"val/{metric}"] = torch.stack(seen).mean()
        return means | found


def columns(parts: Sequence[Mapping[str, int]]) -> list[str]:
    """The columns of metrics.csv that `PartMetrics` fills and a run without parts has not."""
    return ["val/accuracy", "val/sequence_accuracy", *(column(metric, part) for part in parts for metric in METRICS)]
