"""What the kernel computes, in PyTorch: the definition that it is compared with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up
