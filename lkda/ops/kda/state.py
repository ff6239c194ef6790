"""The formats of a state between tokens: float32, bf16, or int8 with a float32 factor for each row of K."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.precision import at_least_float32

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def pack_state(state: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Converts a state [..., K, V] to (state,), or for int8 to (codes [..., K, V], factors [..., K]).

    bf16 and int8 are rounded to nearest; docs/guides/generating.md says when that is safe. With float32 the state keeps
    its own dtype, which may be float64.
    """
    if dtype == torch.bfloat16:
        return (state.bfloat16(),)
    if dtype == torch.int8:
        return _rounded_to_int8(state.float())
    return (state,)


def unpack_state(kept: tuple[Tensor, ...]) -> Tensor:
    """The state that `pack_state` converted, in float32 at least."""
    state, *factors = kept
    wide = at_least_float32(state)
    return wide * factors[0].unsqueeze(-1) if factors else wide


def _rounded_to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1)
    inverse = torch.where(largest > 1e-30, 127 / largest, 0).unsqueeze(-1)
    codes = (x * inverse).nan_to_num(0).clamp(-127, 127).round()
    return codes.to(torch.int8), largest / 127
