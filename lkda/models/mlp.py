"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lkda.models.init import reset_children
from lkda.models.linear import FusedLinear, Linear, fused_linear, is_plain, joined_linear
from lkda.ops.swiglu.linear import swiglu_linear


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), no biases."""

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, hidden)
        self.up_proj = Linear(d_model, hidden)
        self.down_proj = Linear(hidden, d_model)

    def reset_parameters(self) -> None:
        """Initialises all weights again."""
        reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and self._is_plain():
            both = joined_linear(x, [self.gate_proj, self.up_proj])
            return swiglu_linear(both, self.down_proj.weight.to(both.dtype))
        gate, up = fused_linear(x, [self.gate_proj, self.up_proj])
        if isinstance(self.down_proj, FusedLinear) and is_plain(self.down_proj):
            return self.down_proj.of_swiglu(gate, up)
        return self.down_proj(F.silu(gate) * up)

    def _is_plain(self) -> bool:
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        return all(is_plain(layer) and not isinstance(layer, FusedLinear) for layer in layers)
