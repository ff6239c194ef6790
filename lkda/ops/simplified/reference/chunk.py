"""Simplified linear attention in chunks, with a hand-derived backward.

Inside a chunk the recurrence is a product with a lower-triangular matrix of decays. From chunk to chunk two numbers per
channel are carried.

    n_i = sum_{j <= i} L_ij x_j + p_i n_0,    x_j = [sigmoid(k_j) v_j, sigmoid(k_j)],
    L_ij = prod_{j < r <= i} b_r,    p_i = prod_{r <= i} b_r,    n = [num, den]

Every factor is a product of decays <= 1. Nothing is divided by a decay, so a decay of 0 is exact too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkda.ops.recurrence import compute_dtype
from lkda.ops.sequences import Chunks, lengths_of
from lkda.ops.simplified.reference.recurrent import EPS, simplified_recurrent

CHUNK = 64


def _cut(chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> tuple[Tensor, ...]:
    """The inputs cut into chunks. Tokens past the end do not change the state: their key is -inf and their b is 1."""
    dtype = compute_dtype(v)
    filled = ((q, 0.0), (k, -torch.inf), (v, 0.0), (decay, 1.0))
    return tuple(chunks.cut(x, dtype, fill=fill) for x, fill in filled)


def _decays(b: Tensor) -> tuple[Tensor, Tensor]:
    """b [M, H, C] -> L [M, H, C, C] (lower triangle, ones on the diagonal) and p [M, H, C, 1]."""
    C = b.shape[-1]
    later = torch.ones(C, C, dtype=torch.bool, device=b.device).tril(-1)
    L = torch.where(later, b.unsqueeze(-1), 1.0).cumprod(-2).tril()
    return L, (L[..., 0] * b[..., :1]).unsqueeze(-1)


def _writes(k: Tensor, v: Tensor) -> Tensor:
    write = torch.sigmoid(k)
    return torch.cat([write * v, write], -1)


def _entries(chunks: Chunks, last: Tensor, p: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state [M, H, 2D] that each chunk is entered with, and the states after the last ones.

    last: what the chunk's own tokens leave, [M, H, 2D]; p: [M, H, C, 1]; state: [N, H, 2D], sorted.
    """
    entries, start = [], 0
    for alive in chunks.alive:
        rows = slice(start, start + alive)
        entries.append(state[:alive])
        left = p[rows, :, -1] * state[:alive] + last[rows]
        state = left if alive == len(state) else torch.cat([left, state[alive:]])
        start += alive
    return torch.cat(entries), state


class _Simplified(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(v)
        chunks = Chunks(lengths_of(v.shape[0], v.shape[1], cu_seqlens), CHUNK, v.device)
        qc, kc, vc, b = _cut(chunks, q, k, v, decay)
        L, p = _decays(b)
        n = L @ _writes(kc, vc)
        entries, final = _entries(chunks, n[:, :, -1], p, chunks.sort(initial_state.to(dtype).flatten(-2)))
        num, den = (n + p * entries.unsqueeze(-2)).chunk(2, -1)
        ctx.save_for_backward(q, k, v, decay, initial_state, entries)
        ctx.chunks = chunks
        return chunks.join(qc * (num / (den + EPS)), v), chunks.unsort(final).unflatten(-1, (2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, initial_state, entries = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        dtype = compute_dtype(v)
        qc, kc, vc, b = _cut(chunks, q, k, v, decay)
        doc = chunks.cut(do, dtype)
        L, p = _decays(b)
        n = L @ _writes(kc, vc) + p * entries.unsqueeze(-2)
        num, den = n.chunk(2, -1)
        mean = num / (den + EPS)

        # The gradient of n_i through its own output, then through the later tokens of the chunk and of the sequence.
        dnum = doc * qc / (den + EPS)
        dn = torch.cat([dnum, -dnum * mean], -1)
        inside = L.mT @ dn
        through = (p * dn).sum(-2)
        dstate = chunks.sort(dfinal.to(dtype).flatten(-2))
        after, start = torch.empty_like(entries), chunks.count
        for alive in reversed(chunks.alive):
            start -= alive
            rows = slice(start, start + alive)
            after[rows] = dstate[:alive]
            dstate[:alive] = p[rows, :, -1] * dstate[:alive] + through[rows]
        dn = inside + L[:, :, -1].unsqueeze(-1) * after.unsqueeze(-2)

        before = torch.cat([entries.unsqueeze(-2), n[:, :, :-1]], -2)
        db = (dn * before).sum(-1)
        dnum, dden = dn.chunk(2, -1)
        write = torch.sigmoid(kc)
        dk = (dnum * vc + dden) * (write * (1 - write))
        return (
            chunks.join(doc * mean, q),
            chunks.join(dk, k),
            chunks.join(dnum * write, v),
            chunks.join(db, decay),
            chunks.unsort(dstate).reshape(initial_state.shape).to(initial_state.dtype),
            None,
        )


def simplified_chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole sequence; arguments as in `simplified_attention`, decay [B, T, H]."""
    if not len(v):  # there is no chunk
        return simplified_recurrent(q, k, v, decay, initial_state, cu_seqlens)
    if initial_state is None:
        N = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = torch.zeros(N, *v.shape[2:3], 2, v.shape[3], dtype=compute_dtype(v), device=v.device)
    return _Simplified.apply(q, k, v, decay, initial_state, cu_seqlens)
