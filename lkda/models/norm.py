"""The norm of a head's output, with a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkda.models.precision import at_least_float32


class GatedHeadNorm(nn.Module):
    """RMSNorm(o) * w * sigmoid(gate) over the last dimension, in float32 at least, eps 1e-5. Weight [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o, gate: [..., head_dim]; no gate where None."""
        y = F.rms_norm(at_least_float32(o), self.weight.shape, at_least_float32(self.weight), 1e-5)
        return (y if gate is None else y * torch.sigmoid(at_least_float32(gate))).to(o.dtype)


def l2_normalized(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed in float32 at least, in x's dtype."""
    y = at_least_float32(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
