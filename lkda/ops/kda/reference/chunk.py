"""Kimi Delta Attention in chunks of 64 tokens, as matrix products in PyTorch, with a hand-derived backward.

The notation is that of docs/reference/mixers.md. For one head and one chunk that the state h enters, with G the running
sum of g inside the chunk, G_C its last row and B = diag(beta):

    qg = exp(G) q       k_in = exp(G) k       kg = exp(G_C - G) k
    T = (I + B Akk)^-1     w = T B k_in       u = T B v       v_new = u - w h
    o = scale (qg h + Aqk v_new)              h' = Diag(exp G_C) h + kg^T v_new

`decay.py` computes Aqk and Akk. Only the lines with h and h' go from chunk to chunk; everything else is computed for
all chunks at once. The forward saves the inputs and each chunk's h. The backward computes the rest again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkda.ops.kda.reference.decay import Decays, before_here, decays, from_here, pair_gradients, pair_scores
from lkda.ops.kda.reference.recurrent import kda_recurrent
from lkda.ops.recurrence import compute_dtype
from lkda.ops.sequences import Chunks, lengths_of

CHUNK = 64

# Every matrix product of this module except the triangular solve calls this name, so that a test can give the operands
# the precision of a tensor core.
product = torch.matmul


class _IntraChunk(NamedTuple):
    """What a chunk holds before the state that enters it is known. [M, H, C, .] unless said otherwise."""

    E: Tensor  # exp g
    decay: Decays
    qg: Tensor
    k_in: Tensor
    kg: Tensor
    total: Tensor  # exp G_C, [M, H, K, 1]
    Akk: Tensor
    Aqk: Tensor
    T: Tensor
    w: Tensor
    u: Tensor


def _intra_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _IntraChunk:
    E = g.exp()
    decay = decays(E)
    Akk, Aqk = pair_scores(q, k, E, decay, product)
    eye = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
    T = torch.linalg.solve_triangular(beta * Akk, eye.expand_as(Akk), upper=False, unitriangular=True)
    qg, k_in, kg = decay.before * q, decay.before * k, decay.after * k
    w, u = product(T, beta * k_in), product(T, beta * v)
    return _IntraChunk(E, decay, qg, k_in, kg, decay.before[:, :, -1].unsqueeze(-1), Akk, Aqk, T, w, u)


class _KDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(v)
        chunks = Chunks(lengths_of(v.shape[0], v.shape[1], cu_seqlens), CHUNK, v.device)
        qc, kc, vc, gc = (chunks.cut(x, dtype) for x in (q, k, v, g))
        c = _intra_chunk(qc, kc, vc, gc, chunks.cut(beta, dtype).unsqueeze(-1))
        state = chunks.sort(initial_state.to(dtype)).clone()
        h = c.kg.new_empty(chunks.count, *state.shape[1:])
        v_new = torch.empty_like(c.u)
        start = 0
        for alive in chunks.alive:
            rows = slice(start, start + alive)
            h[rows] = entering = state[:alive]
            v_new[rows] = c.u[rows] - product(c.w[rows], entering)
            state[:alive] = c.total[rows] * entering + product(c.kg[rows].mT, v_new[rows])
            start += alive
        o = scale * (product(c.qg, h) + product(c.Aqk, v_new))
        ctx.save_for_backward(q, k, v, g, beta, initial_state, h)
        ctx.chunks, ctx.scale = chunks, scale
        return chunks.join(o, v), chunks.unsort(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, initial_state, h = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        dtype = compute_dtype(v)
        qc, kc, vc, gc = (chunks.cut(x, dtype) for x in (q, k, v, g))
        bc = chunks.cut(beta, dtype).unsqueeze(-1)
        do = ctx.scale * chunks.cut(do, dtype)
        c = _intra_chunk(qc, kc, vc, gc, bc)
        v_new = c.u - product(c.w, h)

        # From the last chunk to the first: dh_next, the gradient of the state that leaves each chunk.
        dv_new, qdo = product(c.Aqk.mT, do), product(c.qg.mT, do)
        dstate = chunks.sort(dfinal.to(dtype)).clone()
        dh_next = torch.empty_like(h)
        start = chunks.count
        for alive in reversed(chunks.alive):
            start -= alive
            rows = slice(start, start + alive)
            dh_next[rows] = leaving = dstate[:alive]
            dv_new[rows] += product(c.kg[rows], leaving)
            dstate[:alive] = c.total[rows] * leaving + qdo[rows] - product(c.w[rows].mT, dv_new[rows])

        # All chunks at once. v_new = T B r with the residual r = v - k_in h; Y is the gradient of B r.
        Y = product(c.T.mT, dv_new)
        dv = bc * Y
        dAqk = product(do, v_new.mT).tril()
        Yv = product(Y, v_new.mT).tril(-1)
        residual = vc - product(c.k_in, h)
        dbeta = (Y * residual).sum(-1) - (Yv * c.Akk).sum(-1)
        dqg, dk_in, dkg = product(do, h.mT), -product(dv, h.mT), product(v_new, dh_next.mT)
        dq, dk, dg = pair_gradients(qc, kc, c.E, c.decay, -bc * Yv, dAqk, product)
        dq += c.decay.before * dqg
        dk += c.decay.before * dk_in + c.decay.after * dkg
        # g_t decays what comes from the past to the tokens i >= t, what the tokens j < t leave to later chunks, and h
        # on its way to h'.
        dg += from_here(c.qg * dqg + c.k_in * dk_in) + before_here(c.kg * dkg)
        dg += (c.total * h * dh_next).sum(-1).unsqueeze(-2)
        return (
            chunks.join(dq, q),
            chunks.join(dk, k),
            chunks.join(dv, v),
            chunks.join(dg, g),
            chunks.join(dbeta, beta),
            chunks.unsort(dstate).to(initial_state.dtype),
            None,
            None,
        )


def kda_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The chunked form on whole sequences. Arguments and results are those of `kda_attention`."""
    B, _, H, K = q.shape
    if not B:  # there is no chunk
        return kda_recurrent(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    if initial_state is None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = torch.zeros(N, H, K, v.shape[-1], dtype=compute_dtype(v), device=v.device)
    return _KDA.apply(q, k, v, g, beta, initial_state, scale, cu_seqlens)
