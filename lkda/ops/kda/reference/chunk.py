"""Kimi Delta Attention in chunks of 64 tokens, in PyTorch matrix products, its backward derived by hand.

For a chunk entered with state S0 (per head; before, after: running products of E = exp(g), B = diag(beta)):

    T = (I + B M)^-1      W = T B (before k)      U = T B v      N = U - W S0
    o = scale ((before q) S0 + P N)               S1 = Diag(prod E) S0 + (after k)^T N

M and P come from `decay.py`. Everything but the two lines with S0 runs over all chunks at once. Only the inputs and the
states at the chunks' entries are saved; the backward computes the rest again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lkda.ops.kda.reference.decay import Decays, before_here, decays, from_here, pair_gradients, pair_scores
from lkda.ops.recurrence import compute_dtype
from lkda.ops.sequences import Chunks, lengths_of

CHUNK = 64

# Every matrix product of this module but the triangular solve goes through this name, so that a test can give the
# operands a tensor core's precision.
product = torch.matmul


class _Prepared(NamedTuple):
    """What a chunk holds before its entry state is known. [M, H, C, .]"""

    E: Tensor
    decay: Decays
    qg: Tensor  # before q
    kg: Tensor  # before k
    kd: Tensor  # after k
    total: Tensor  # prod E, [M, H, K, 1]
    M: Tensor
    P: Tensor
    T: Tensor
    W: Tensor
    U: Tensor


def _prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Prepared:
    E = g.exp()
    decay = decays(E)
    M, P = pair_scores(q, k, E, decay, product)
    eye = torch.eye(CHUNK, dtype=q.dtype, device=q.device)
    T = torch.linalg.solve_triangular(beta * M, eye.expand_as(M), upper=False, unitriangular=True)
    kg = decay.before * k
    W, U = product(T, beta * kg), product(T, beta * v)
    return _Prepared(
        E, decay, decay.before * q, kg, decay.after * k, decay.before[:, :, -1].unsqueeze(-1), M, P, T, W, U
    )


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
        c = _prepare(qc, kc, vc, gc, chunks.cut(beta, dtype).unsqueeze(-1))
        state = chunks.sort(initial_state.to(dtype)).clone()
        entries = c.kd.new_empty(chunks.count, *state.shape[1:])
        N = torch.empty_like(c.U)
        start = 0
        for alive in chunks.alive:
            rows = slice(start, start + alive)
            entries[rows] = S = state[:alive]
            N[rows] = n = c.U[rows] - product(c.W[rows], S)
            state[:alive] = c.total[rows] * S + product(c.kd[rows].mT, n)
            start += alive
        o = scale * (product(c.qg, entries) + product(c.P, N))
        ctx.save_for_backward(q, k, v, g, beta, initial_state, entries)
        ctx.chunks, ctx.scale = chunks, scale
        return chunks.join(o, v), chunks.unsort(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, initial_state, S0 = ctx.saved_tensors
        chunks: Chunks = ctx.chunks
        dtype = compute_dtype(v)
        qc, kc, vc, gc = (chunks.cut(x, dtype) for x in (q, k, v, g))
        bc = chunks.cut(beta, dtype).unsqueeze(-1)
        do = ctx.scale * chunks.cut(do, dtype)
        c = _prepare(qc, kc, vc, gc, bc)
        N = c.U - product(c.W, S0)

        # Backwards through the chunks: dS1, the gradient of the state that each chunk leaves.
        dN, qdo = product(c.P.mT, do), product(c.qg.mT, do)
        dstate = chunks.sort(dfinal.to(dtype)).clone()
        dS1 = torch.empty_like(S0)
        start = chunks.count
        for alive in reversed(chunks.alive):
            start -= alive
            rows = slice(start, start + alive)
            dS1[rows] = dS = dstate[:alive]
            dN[rows] += product(c.kd[rows], dS)
            dstate[:alive] = c.total[rows] * dS + qdo[rows] - product(c.W[rows].mT, dN[rows])

        # All chunks at once. Y is the gradient of B (v - kg S0), of which N = T B (v - kg S0).
        Y = product(c.T.mT, dN)
        dv = bc * Y
        dP = product(do, N.mT).tril()
        YN = product(Y, N.mT).tril(-1)
        residual = vc - product(c.kg, S0)
        dbeta = (Y * residual).sum(-1) - (YN * c.M).sum(-1)
        dqg, dkg, dkd = product(do, S0.mT), -product(dv, S0.mT), product(N, dS1.mT)
        dq, dk, dg = pair_gradients(qc, kc, c.E, c.decay, -bc * YN, dP, product)
        dq += c.decay.before * dqg
        dk += c.decay.before * dkg + c.decay.after * dkd
        # g_t decays what entered the chunk, for rows >= t; what columns < t leave to later chunks; and S0 on to S1.
        dg += from_here(c.qg * dqg + c.kg * dkg) + before_here(c.kd * dkd)
        dg += (c.total * S0 * dS1).sum(-1).unsqueeze(-2)
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
    """The whole sequence; arguments as in `kda_attention`."""
    B, _, H, K = q.shape
    if initial_state is None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        initial_state = torch.zeros(N, H, K, v.shape[-1], dtype=compute_dtype(v), device=v.device)
    return _KDA.apply(q, k, v, g, beta, initial_state, scale, cu_seqlens)
