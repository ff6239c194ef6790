"""What the kernels compute, in PyTorch: the definition that they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def residual_norm_torch(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `residual_norm`."""
    s = x if y is None else x + y
    wide = torch.promote_types(s.dtype, torch.float32)
    return s, F.rms_norm(s.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
