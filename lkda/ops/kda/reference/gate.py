"""The layer's gates in PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops.precision import at_least_float32

FORMS = ("softplus", "bounded")


def log_decay(
    logits: Tensor, A_log: Tensor, dt_bias: Tensor, *, head_dim: int, gate: str = "softplus", lower_bound: float = -5.0
) -> Tensor:
    """g [..., H, K] in float32 at least, <= 0.

        softplus: -exp(A_log) softplus(logits + dt_bias)
        bounded: lower_bound sigmoid(exp(A_log) (logits + dt_bias))

    Args:
        logits: [..., H, K], or [..., H, 1] for one decay a head.
        A_log: of H numbers.   dt_bias: of H K numbers, or of H.
        gate: softplus | bounded.   lower_bound: of g where it is bounded.
    """
    raw = at_least_float32(logits) + at_least_float32(dt_bias).view(logits.shape[-2:])
    A = at_least_float32(A_log).exp().view(-1, 1)
    g = lower_bound * torch.sigmoid(A * raw) if gate == "bounded" else -A * F.softplus(raw)
    return g.expand(*logits.shape[:-1], head_dim)


def write_strength(logits: Tensor, *, negative_eigenvalues: bool = False) -> Tensor:
    """beta in float32 at least: sigmoid, or twice that."""
    beta = torch.sigmoid(at_least_float32(logits))
    return 2 * beta if negative_eigenvalues else beta
