"""Shapes of heads that the kernels of KDA do not have: more value heads than key heads, and V other than K."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, ...] -> [B, T, heads, ...], each head heads / H times in a row."""
    times = heads // x.shape[2]
    return x.unsqueeze(3).expand(*x.shape[:3], times, *x.shape[3:]).flatten(2, 3)


def in_square_heads(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`run`, which needs K = V, for any V. Arguments and results are those of `kda_attention`, with as many key heads
    as value heads.

    A column of the state depends on no other column of v than its own. So a head of V columns is V / K heads of K
    columns with the same q, k, g and beta, where V is padded with zeros to a multiple of K. The gradients of the
    padding are zero, and autograd sums those of what is repeated.
    """
    H, K, V = v.shape[2], q.shape[3], v.shape[3]
    parts = -(-V // K)
    wide = F.pad(v, (0, parts * K - V)).unflatten(3, (parts, K)).flatten(2, 3)
    inputs = [repeat_heads(x, H * parts) for x in (q, k, g, beta)]
    state = None
    if initial_state is not None:  # [N, H, K, parts * K] -> [N, H * parts, K, K]
        state = F.pad(initial_state, (0, parts * K - V)).unflatten(3, (parts, K)).transpose(2, 3).flatten(1, 2)
    q, k, g, beta = inputs
    o, final_state = run(q, k, wide, g, beta, scale, state, cu_seqlens)
    o = o.unflatten(2, (H, parts)).flatten(3)[..., :V]
    return o, final_state.unflatten(1, (H, parts)).transpose(2, 3).flatten(3)[..., :V]
