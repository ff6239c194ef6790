"""The gated norm in PyTorch: the definition that the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HeadNorm:
    """The norm of the heads of an operator's output, for an operator that computes it too.

    Attributes:
        weight: [D].
        gate: the logits of the gate, of the output's shape; None for no gate.
        eps: added to the mean of the squares.
    """

    weight: Tensor
    gate: Tensor | None
    eps: float


def gated_norm_torch(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Arguments and result as in `gated_rms_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return (y if gate is None else y * torch.sigmoid(gate.to(wide))).to(x.dtype)
