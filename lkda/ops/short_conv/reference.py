"""The short convolution and the L2 norm per head in PyTorch: the definition that the kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops.precision import at_least_float32
from lkda.ops.sequences import positions

EPS = 1e-6


def convolve_torch(x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """One tensor of `short_convolutions`: SiLU(sum_s w_s x_{t-s}), and the last inputs.

    It is computed as `width` shifted multiply-adds. On a CPU that is as fast as a grouped convolution, forward and
    backward, and packed sequences need only a mask.
    """
    T, width = x.shape[1], weight.shape[-1]
    taps = weight.to(x.dtype)[:, 0].unbind(-1)
    packed = cu_seqlens is not None
    before = x.new_zeros(len(x), width - 1, x.shape[2]) if state is None or packed else state.to(x.dtype)
    window = torch.cat([before, x], 1)
    lags = [window[:, width - 1 - s : width - 1 - s + T] for s in range(width)]
    if cu_seqlens is not None:
        lags = _within_sequences(lags, state, cu_seqlens)
    y = lags[0] * taps[-1]
    for s in range(1, width):
        y = torch.addcmul(y, lags[s], taps[-1 - s])
    last = window[:, T:].clone() if cu_seqlens is None else last_of_sequences(x, width, state, cu_seqlens)
    return F.silu(y), last.to(weight.dtype if state is None else state.dtype)


def convolve_step_torch(x: Tensor, weight: Tensor, cache: Tensor) -> Tensor:
    """One token of `convolve_torch`, in few operations: x [B, H, D] with the cache [B, width - 1, H * D], which is
    updated in place."""
    window = torch.cat([cache.to(x.dtype), x.flatten(1).unsqueeze(1)], 1)
    cache.copy_(window[:, 1:])
    return F.silu((window * weight[:, 0].T.to(x.dtype)).sum(1)).view_as(x)


def _within_sequences(lags: list[Tensor], state: Tensor | None, cu_seqlens: Tensor) -> list[Tensor]:
    """lags[s] [1, T, channels]: the input s tokens ago, from the state where that is before the token's sequence."""
    position, sequence = positions(cu_seqlens, lags[0].shape[1])
    found = lags[:1]
    for s, lag in enumerate(lags[1:], 1):
        inside = (position >= s).unsqueeze(-1)
        if state is None:
            found.append(torch.where(inside, lag, 0))
        else:
            row = (position + state.shape[1] - s).clamp(0, state.shape[1] - 1)
            found.append(torch.where(inside, lag, state[sequence, row].to(lag.dtype)))
    return found


def last_of_sequences(x: Tensor, width: int, state: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """The last inputs of each sequence, [N, width - 1, channels]. In a short one the state's inputs come first."""
    begin, end = cu_seqlens.long()[:-1, None], cu_seqlens.long()[1:, None]
    row = torch.arange(width - 1, device=x.device)
    token = end - (width - 1) + row
    found = x[0][token.clamp(0, x.shape[1] - 1)]
    if state is None:
        return torch.where((token >= begin).unsqueeze(-1), found, 0)
    earlier = (row + end - begin).clamp(max=width - 2).unsqueeze(-1).expand_as(found)
    return torch.where((token >= begin).unsqueeze(-1), found, state.to(x.dtype).gather(1, earlier))


def normalize_torch(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, computed in float32 at least, in x's dtype."""
    y = at_least_float32(x)
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + EPS)).to(x.dtype)
