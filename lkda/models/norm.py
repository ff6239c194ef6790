"""The gated norm of the output of each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.ops import gated_rms_norm


class GatedHeadNorm(nn.Module):
    """RMSNorm(o) * w * sigmoid(gate) over the last dimension, in float32 at least, eps 1e-5. Weight w: [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o, gate: [..., head_dim]; without a gate where it is None."""
        return gated_rms_norm(o, None if gate is None else gate.to(o.dtype), self.weight)
