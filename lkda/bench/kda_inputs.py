"""Random inputs of `kda_attention` for benchmarks: normalised q and k, and activated g and beta."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:  # `lkda.bench.tree_times` loads this file beside a package `lkda` that may lack the module
    from lkda.bench.op_benchmark import Inputs, Shape

NAMES = ("q", "k", "v", "g", "beta")
GATES = ("slow", "fast")  # regimes of the decay, see `inputs`


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k of unit norm, v ~ N(0, 1), beta = sigmoid(N(0, 1)), and g in float32.

    With the gate "slow", g is as in a newly initialised layer: A ~ U(1, 16) per head, dt log-uniform in [1e-3, 0.1] per
    channel, and a small part that depends on the token. With "fast", g = -5 sigmoid(N(0, 1)).
    """
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    q, k = (F.normalize(torch.randn(B, T, H, D, device=device), dim=-1).to(dtype) for _ in range(2))
    v = torch.randn(B, T, H, D, dtype=dtype, device=device)
    g = torch.randn(B, T, H, D, device=device)
    if gate == "fast":
        g = -5 * torch.sigmoid(g)
    else:
        A = 1 + 15 * torch.rand(H, 1, device=device)
        dt = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(H, D, device=device))
        g = -A * F.softplus(torch.log(torch.expm1(dt)) + 0.1 * g)
    return {"q": q, "k": k, "v": v, "g": g, "beta": torch.sigmoid(torch.randn(B, T, H, device=device))}
