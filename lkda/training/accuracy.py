"""Accuracy per target and per whole sequence, for each subset of the validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lkda.models.lm import LanguageModel
from lkda.targets import IGNORE_INDEX

# Logits are computed for this many positions at a time. They take 256 MB for a vocabulary of 8192.
PLACES_AT_ONCE = 8192


def described(subset: Mapping[str, int]) -> dict[str, int]:
    """The properties of a subset, such as {"length": 64, "pairs": 4}: its entries without the number of examples."""
    return {name: value for name, value in subset.items() if name != "examples"}


def subset_name(subset: Mapping[str, int]) -> str:
    """The name of a subset, such as length_64_pairs_4."""
    return "_".join(f"{name}_{value}" for name, value in described(subset).items())


def column(metric: str, subset: Mapping[str, int]) -> str:
    """The column of metrics.csv that holds `metric` of a subset: val/accuracy/length_64_pairs_4."""
    return f"val/{metric}/{subset_name(subset)}"


METRICS = ("accuracy", "sequence_accuracy", "loss")


class SubsetMetrics(nn.Module):
    """For each subset: accuracy per target, accuracy per whole sequence, and loss in nats per target.

    Args:
        subsets: of the validation, such as {"length": 64, "pairs": 4}.
        vocab_size: of the model.
    """

    def __init__(self, subsets: Sequence[Mapping[str, int]], *, vocab_size: int) -> None:
        super().__init__()
        self.subsets = list(subsets)
        options: dict[str, Any] = {"num_classes": vocab_size, "ignore_index": IGNORE_INDEX, "validate_args": False}
        self.accuracy = nn.ModuleList(MulticlassAccuracy(average="micro", **options) for _ in subsets)
        self.sequence_accuracy = nn.ModuleList(MeanMetric() for _ in subsets)
        self.loss = nn.ModuleList(MeanMetric() for _ in subsets)

    def measure(self, model: LanguageModel, batch: Mapping[str, Any]) -> None:
        """Add the model's predictions on a validation batch {tokens, targets, target_positions, subset}."""
        subset, targets = batch["subset"], batch["targets"]
        hidden, wanted = model.hidden(batch["tokens"]).flatten(0, 1), targets.flatten()
        predicted = torch.zeros_like(wanted)
        for places in batch["target_positions"].split(PLACES_AT_ONCE):
            logits = model.lm_head(hidden[places]).float()
            predicted[places] = logits.argmax(-1)
            loss = F.cross_entropy(logits, wanted[places]) if len(places) else logits.sum()
            self.loss[subset].update(loss, weight=len(places))
        predicted = predicted.view_as(targets)
        self.accuracy[subset].update(predicted, targets)
        ignored = targets == IGNORE_INDEX
        whole = ((predicted == targets) | ignored).all(1)
        # A row without targets is no example: a process's share may have one more row than there are examples.
        self.sequence_accuracy[subset].update(whole.float(), weight=(~ignored.all(1)).float())

    def compute(self) -> dict[str, Tensor]:
        """The metrics by column of metrics.csv: of each measured subset, and their means as val/accuracy and so on.
        Resets them."""
        found, means = {}, {}
        for metric in METRICS:
            seen = []
            for subset, measured in zip(self.subsets, getattr(self, metric), strict=True):
                if measured.update_called:
                    found[column(metric, subset)] = measured.compute()
                    seen.append(found[column(metric, subset)])
                measured.reset()
            means[f"val/{metric}"] = torch.stack(seen).mean()
        return means | found


def by_subset(subsets: Sequence[Mapping[str, int]], measured: Mapping[str, float]) -> list[dict[str, Any]]:
    """A record for each subset, as in summary.json and in evaluations: {"name", "subset", and its metrics}.

    Args:
        measured: the metrics by column of metrics.csv. A metric that is missing here is left out.
    """
    return [
        {"name": subset_name(subset), "subset": described(subset)}
        | {metric: measured[column(metric, subset)] for metric in METRICS if column(metric, subset) in measured}
        for subset in subsets
    ]


def columns(subsets: Sequence[Mapping[str, int]]) -> list[str]:
    """The additional columns of metrics.csv that `SubsetMetrics` fills."""
    return [
        "val/accuracy",
        "val/sequence_accuracy",
        *(column(metric, subset) for subset in subsets for metric in METRICS),
    ]
