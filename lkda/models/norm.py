"""The norm of a head's output, with a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedHeadNorm(nn.Module):
    """RMSNorm(o) * w * sigmoid(gate) over the last dimension, computed in float32, eps 1e-5. Weight [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o, gate: [..., head_dim]; no gate where None."""
        y = F.rms_norm(o.float(), self.weight.shape, self.weight.float(), 1e-5)
        return (y if gate is None else y * torch.sigmoid(gate.float())).to(o.dtype)


def l2_normalized(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed in float32, in x's dtype."""
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
