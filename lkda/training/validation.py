"""How a validation is measured, batch by batch: one measurement, for training and for scripts/evaluate.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lkda.models.lm import LanguageModel
from lkda.special_tokens import IGNORE_INDEX
from lkda.training.accuracy import SubsetMetrics
from lkda.training.losses import next_token_losses
from lkda.training.positions import PositionLoss

# {tokens [B, T], targets [B, T], cu_seqlens [N + 1] or None}, and where few targets are predicted: their positions in
# the flattened batch, target_positions [N], and the number of the batch's subset.
Batch = Mapping[str, Any]
# (tokens, targets, cu_seqlens) of a batch -> the loss of each target, [B, T].
TokenLosses = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ValidationMetrics(nn.Module):
    """Measures a model on the batches of a validation.

    Of a text: the mean loss over every target (not over batches, whose numbers of targets differ), the same in bits per
    byte, and the loss by position (`PositionLoss`). Of a validation that has subsets: what `SubsetMetrics` computes.

    Args:
        context: tokens of a sequence, at most.
        vocab_size: of the model.
        bytes_per_token: of the validation text; None where the tokens are no text.
        val_subsets: of the validation; see `lkda.training.accuracy`.
        split: the beginning of the columns, "val", or "test" for a text that is measured likewise.

    Attributes:
        count: int64, the targets of a text that were measured since the last `compute`.
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
        """Take in what the model makes of a batch, which is on its device.

        Args:
            token_losses: in place of the model's own, as compiled.
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
        """By column of metrics.csv; begins anew."""
        if self.subsets is not None:
            return self.subsets.compute()
        loss = self.nats / self.count
        self.nats.zero_()
        self.count.zero_()
        return with_bits(self.split, loss, self.bytes_per_token) | self.positions.compute()


def with_bits(split: str, loss: Tensor, bytes_per_token: float | None) -> dict[str, Tensor]:
    """The loss in nats per token; where the tokens are text also in bits per byte, which compares across tokenizers."""
    bits = {} if bytes_per_token is None else {"bits_per_byte": loss / (math.log(2) * bytes_per_token)}
    return {f"{split}/{name}": value for name, value in {"loss": loss, **bits}.items()}
