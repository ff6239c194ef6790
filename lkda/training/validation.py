"""Measures a model on validation batches, in the same way for training and for scripts/evaluate.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lkda.models.lm import LanguageModel
from lkda.targets import IGNORE_INDEX
from lkda.training.accuracy import SubsetMetrics
from lkda.training.losses import next_token_losses
from lkda.training.positions import PositionLoss
from lkda.training.processes import sum_over_processes

# {tokens [B, T], targets [B, T], cu_seqlens [N + 1] or None}. A batch with few targets also has target_positions [M],
# their positions in the flattened batch, and subset, the number of the batch's subset.
Batch = Mapping[str, Any]
# (tokens, targets, cu_seqlens) of a batch -> the loss of each target, [B, T].
TokenLosses = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ValidationMetrics(nn.Module):
    """Measures a model on the batches of a validation.

    For text, it computes the mean loss over all targets (not over batches, whose numbers of targets differ) in nats per
    token and in bits per byte, and the loss by position (`PositionLoss`). For a validation with subsets, it computes
    what `SubsetMetrics` does.

    Args:
        context: the largest number of tokens in a sequence.
        vocab_size: of the model.
        bytes_per_token: of the validation text; None if the tokens are not text.
        val_subsets: of the validation; see `lkda.training.accuracy`.
        split: prefix of the column names, "val" or "test".

    Attributes:
        count: int64 scalar, the number of text targets since the last `compute`.
    """

    nats: Tensor
    count: Tensor

    def __init__(
        self,
        *,
        context: int,
        vocab_size: int,
        bytes_per_token: float | None,
        val_subsets: Sequence[Mapping[str, int]] = (),
        split: str = "val",
    ) -> None:
        super().__init__()
        self.split = split
        self.bytes_per_token = bytes_per_token
        self.subsets = SubsetMetrics(val_subsets, vocab_size=vocab_size) if val_subsets else None
        self.positions = PositionLoss(context, split=split)
        self.register_buffer("nats", torch.zeros((), dtype=torch.float64), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def update(self, model: LanguageModel, batch: Batch, *, token_losses: TokenLosses | None = None) -> None:
        """Add the model's loss on a batch, which must be on the model's device.

        Args:
            token_losses: computes the losses, for example with compiled blocks. None means a plain forward of the
                model.
        """
        if self.subsets is not None:
            self.subsets.measure(model, batch)
            return
        targets, cu_seqlens = batch["targets"], batch["cu_seqlens"]
        if token_losses is None:
            losses = next_token_losses(model(batch["tokens"], cu_seqlens=cu_seqlens), targets)
        else:
            losses = token_losses(batch["tokens"], targets, cu_seqlens)
        self.nats += losses.sum(dtype=torch.float64)
        self.count += (targets != IGNORE_INDEX).sum()
        self.positions.update(losses, targets, cu_seqlens)

    def compute(self) -> dict[str, Tensor]:
        """The metrics by column of metrics.csv, over what all processes have measured. Resets them."""
        if self.subsets is not None:
            return self.subsets.compute()
        sum_over_processes(self.nats, self.count)
        loss = self.nats / self.count
        self.nats.zero_()
        self.count.zero_()
        return with_bits(self.split, loss, self.bytes_per_token) | self.positions.compute()


def with_bits(split: str, loss: Tensor, bytes_per_token: float | None) -> dict[str, Tensor]:
    """The loss in nats per token. For text also in bits per byte, which is comparable across tokenizers."""
    bits = {} if bytes_per_token is None else {"bits_per_byte": loss / (math.log(2) * bytes_per_token)}
    return {f"{split}/{name}": value for name, value in {"loss": loss, **bits}.items()}
