"""Simplified linear attention as its equation stands: one token after another. All other forms are compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.recurrence import compute_dtype, run_tokens

# Keeps the output finite where every key so far is very negative. It is part of the definition.
EPS = 1e-30


def simplified_step_recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token.

        num = b num + sigmoid(k) v,    den = b den + sigmoid(k),    o = q num / (den + 1e-30)

    Args:
        q, k, v: [B, H, D].   decay: b, [B, H].   state: [B, H, 2, D] (num, den). All are of one dtype.
    Returns: o [B, H, D] and the state after the token.
    """
    write = torch.sigmoid(k)
    state = decay[..., None, None] * state + torch.stack([write * v, write], -2)
    num, den = state.unbind(-2)
    return q * (num / (den + EPS)), state


def simplified_recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, differentiable by autograd.

    Arguments as in `simplified_attention`, with decay [B, T, H].
    """
    B, _, H, D = q.shape
    dtype = compute_dtype(v)
    if initial_state is None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = v.new_zeros(N, H, 2, D)
    inputs = [x.to(dtype) for x in (q, k, v, decay)]
    o, state = run_tokens(simplified_step_recurrent, inputs, initial_state.to(dtype), cu_seqlens)
    return o.to(v.dtype), state
