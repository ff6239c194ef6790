"""Rotary position embedding (arXiv:2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.precision import at_least_float32


def rotate(x: Tensor, position: Tensor, base: float | None) -> Tensor:
    """Rotates the pairs (x_i, x_{i + D/2}) of x [B, T, H, D] by the angles position * base^(-2i/D).

    Args:
        position: [T], or [B, T].
        base: None for no rotation.
    """
    cos, sin = cos_sin(position, x.shape[-1], base, torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    a, b = at_least_float32(x).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


# An operator of its own, because torch.compile would otherwise compute the cosines and sines again for each head and in
# the backward, which takes longer than the rotation.
@torch.library.custom_op("lkda::rotary_cos_sin", mutates_args=())
def cos_sin(position: Tensor, head_dim: int, base: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosines and the sines of the angles, [T or B, T, D/2] each."""
    angle = position.unsqueeze(-1) * frequencies(head_dim, base, dtype, position.device)
    return angle.cos(), angle.sin()


@cos_sin.register_fake
def _(position: Tensor, head_dim: int, base: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = position.new_empty((*position.shape, head_dim // 2), dtype=dtype)
    return angle, torch.empty_like(angle)


_known: dict[tuple[int, float | None, torch.dtype, torch.device], Tensor] = {}


def frequencies(head_dim: int, base: float | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The angles [D/2] of position 1, base^(-2i/D); zeros if `base` is None, so that nothing turns. They are computed
    once: a step of decoding would otherwise compute them again in each layer, and a recorded step must find them. A
    CUDA graph that is being captured gets its own."""
    key = head_dim, base, dtype, device
    if key in _known:
        return _known[key]
    i, half = torch.arange(head_dim // 2, device=device, dtype=dtype), head_dim // 2
    found: Tensor = torch.zeros_like(i) if base is None else base ** (-i / half)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return found
    return _known.setdefault(key, found)
