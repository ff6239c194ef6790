"""The loss of next-token prediction: cross-entropy in nats, in float32."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from lkda.special_tokens import IGNORE_INDEX


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all targets that are not IGNORE_INDEX.

    Args:
        logits: [B, T, vocab].
        targets: [B, T] int64.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target, [B, T]; 0 where it is IGNORE_INDEX. Arguments as of `next_token_loss`."""
    flat = targets.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets)
