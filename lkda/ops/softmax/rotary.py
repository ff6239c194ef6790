"""Rotary position embedding (arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.precision import at_least_float32


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}) of x [B, T, H, D] by the angles position * base^(-2i/D).

    Args:
        position: [T], or [B, T].
    """
    frequency = frequencies(x.shape[-1], base, torch.promote_types(x.dtype, torch.float32), x.device)
    angle = position.to(frequency.dtype).unsqueeze(-1) * frequency  # [T or B, T, D/2]
    cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    a, b = at_least_float32(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def frequencies(head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The angles [D/2] of position 1, base^(-2i/D)."""
    half = head_dim // 2
    rotary: Tensor = base ** (-torch.arange(half, device=device, dtype=dtype) / half)
    return rotary
