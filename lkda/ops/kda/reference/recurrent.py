"""Kimi Delta Attention as its equation stands: one token after another. All other forms are compared with this one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lkda.ops.recurrence import compute_dtype, run_tokens


def kda_step_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token.

        S' = Diag(exp g) S,    S_t = S' + k (beta (v - S'^T k))^T,    o = scale * S_t^T q

    Args:
        q, k, g: [B, H, K].   v: [B, H, V].   beta: [B, H].   state: [B, H, K, V]. All are of one dtype.
    Returns: o [B, H, V] and the state after the token.
    """
    state = g.exp().unsqueeze(-1) * state
    correction = beta.unsqueeze(-1) * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k.unsqueeze(-1) * correction.unsqueeze(-2)
    return scale * torch.einsum("bhkv,bhk->bhv", state, q), state


def kda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, differentiable by autograd. Arguments and results as in `kda_attention`."""
    B, _, H, K = q.shape
    dtype = compute_dtype(v)
    if initial_state is None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = v.new_zeros(N, H, K, v.shape[-1])
    inputs = [x.to(dtype) for x in (q, k, v, g, beta)]
    step = partial(kda_step_recurrent, scale=scale)
    o, state = run_tokens(step, inputs, initial_state.to(dtype), cu_seqlens)
    return o.to(v.dtype), state
