"""How a state is kept from token to token: in float32, in bf16, or in int8 with a float32 factor for each row of K."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.precision import at_least_float32

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_MASK = 0xFFFFFFFF


def pack_state(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A state [..., K, V] as it is kept: (state,), or for int8 (codes [..., K, V], factors [..., K]).

    bf16 and int8 are rounded up or down at random, with chances that make it right on average over many numbers. The
    randomness is a hash of the number and of its place: the same state is always rounded alike, so that a number which
    a constant decay brings back to where it was stays there (docs/decoding.md). Float32 keeps its dtype (which may be
    float64).
    """
    if dtype == torch.bfloat16:
        return (_rounded_to_bfloat16(state.float()),)
    if dtype == torch.int8:
        return _rounded_to_int8(state.float())
    return (state,)


def unpack_state(kept: tuple[Tensor, ...]) -> Tensor:
    """The numbers that `pack_state` kept, float32 at least."""
    state, *factors = kept
    wide = at_least_float32(state)
    return wide * factors[0].unsqueeze(-1) if factors else wide


def _hash(x: Tensor) -> Tensor:
    """32 bits that look random, in int64, of each number of x [..., K, V] in float32 and its place; as in step.cu."""
    bits = x.contiguous().view(torch.int32).long() & _MASK
    place = torch.arange(x.shape[-2] * x.shape[-1], device=x.device).view(x.shape[-2:])
    mixed = ((bits + place * 0x9E3779B1 & _MASK) * 0x85EBCA6B) & _MASK
    return ((mixed ^ mixed >> 15) * 0xC2B2AE35) & _MASK


def _rounded_to_bfloat16(x: Tensor) -> Tensor:
    bits = x.contiguous().view(torch.int32).long() & _MASK
    up = (bits + (_hash(x) >> 16)) >> 16
    up = torch.where(up >= 2**15, up - 2**16, up).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), up)


def _rounded_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 1e-30, 127 / largest, 0).unsqueeze(-1)
    uniform = (_hash(x) >> 9 | 0x3F800000).to(torch.int32).view(torch.float32) - 1.5
    codes = (x * inverse + uniform).nan_to_num(0).clamp(-127, 127).round()
    return codes.to(torch.int8), largest / 127
