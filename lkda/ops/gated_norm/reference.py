"""The gated norm in PyTorch: the definition that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm_torch(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Arguments and result as in `gated_rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return (y if gate is None else y * torch.sigmoid(gate.to(wide))).to(x.dtype)
