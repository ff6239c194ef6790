"""The perplexity of a loss."""

from __future__ import annotations

import math

_LARGEST_LOSS = 700.0  # exp overflows a float above 709
# Shown in place of a perplexity that is None although there is a loss.
TOO_LARGE = "too large for a number"


def perplexity(loss: float | None) -> float | None:
    """exp(loss), of a loss in nats per token; None without a loss, or if it is larger than any float."""
    return math.exp(loss) if loss is not None and loss < _LARGEST_LOSS else None
