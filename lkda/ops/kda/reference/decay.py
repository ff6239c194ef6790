"""Aqk and Akk of the chunked form: scores between the tokens of a chunk, with decays that are exact for every gate.

    Akk_ij = sum_d k_i k_j D_ij  (j < i)      Aqk_ij = sum_d q_i k_j D_ij  (j <= i)      D_ij = prod_{j < r <= i} E_r

per channel, with E = exp(g). For h = 32, 16, 8, 4 each group of 2h tokens is cut into columns J (the earlier half) and
rows I (the later half). The boundary between them, the anchor, splits D_ij = f_i f_j into two products of at most h
factors, each <= 1. So the block of a group is one matrix product of f x and f k. Inside leaves of 4 tokens the pairs
are summed one by one. Nothing is divided and no difference of running sums is taken: no gate overflows and none loses
its digits. Row i reads only tokens <= i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEAF = 4

Product = Callable[[Tensor, Tensor], Tensor]


class Decays(NamedTuple):
    """Products of E over ranges of a chunk, each [M, H, C, K].

    Attributes:
        before: the product over r <= i, which is exp(G_i).
        after: the product over r > i, which is exp(G_C - G_i).
        anchored: for each h the factors f: from the anchor of the group of 2h through i for its rows, from after j to
            the anchor for its columns.
    """

    before: Tensor
    after: Tensor
    anchored: dict[int, Tensor]


def decays(E: Tensor) -> Decays:
    """Computes products inside groups of 1, 2, 4, ... tokens up to the chunk. E is [M, H, C, K]."""
    C = E.shape[-2]
    before, after = E.clone(), torch.ones_like(E)
    anchored = {}
    h = 1
    while h < C:
        b, a = _halves(before, h), _halves(after, h)
        if h >= LEAF:
            anchored[h] = torch.stack([a[..., 0, :, :], b[..., 1, :, :]], -3).view(E.shape)
        a[..., 0, :, :] *= b[..., 1, -1:, :]
        b[..., 1, :, :] *= b[..., 0, -1:, :]
        h *= 2
    return Decays(before, after, anchored)


def _halves(x: Tensor, h: int) -> Tensor:
    """[..., C, K] -> [..., C / 2h, 2, h, K]: the columns (0) and the rows (1) of each group."""
    return x.unflatten(-2, (-1, 2, h))


def _blocks(A: Tensor, h: int) -> Tensor:
    """The blocks (rows, columns) of the groups of 2h in A [..., C, C], as a view [..., C / 2h, h, h]."""
    groups = A.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))  # [..., n, 2, h, n, 2, h]
    return groups[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _leaves(x: Tensor) -> Tensor:
    """[..., C, K] -> [..., C / LEAF, LEAF, K]"""
    return x.unflatten(-2, (-1, LEAF))


def _offset(A: Tensor, d: int) -> Tensor:
    """The pairs (i, i - d) inside each leaf of A [..., C, C], as a view [..., C / LEAF, LEAF - d]."""
    leaves = A.unflatten(-1, (-1, LEAF)).unflatten(-3, (-1, LEAF)).diagonal(dim1=-4, dim2=-2)  # [..., LEAF, LEAF, n]
    return leaves.movedim(-1, -3).diagonal(offset=-d, dim1=-2, dim2=-1)


def _windows(E: Tensor) -> list[Tensor]:
    """The decays of the pairs (i, i - d) of each leaf for d = 0 .. LEAF - 1, each [..., C / LEAF, LEAF - d, K]."""
    e = _leaves(E)
    windows = [torch.ones_like(e), e[..., 1:, :]]
    for d in range(2, LEAF):
        windows.append(windows[-1][..., 1:, :] * e[..., 1 : LEAF - d + 1, :])
    return windows


def pair_scores(q: Tensor, k: Tensor, E: Tensor, decay: Decays, product: Product) -> tuple[Tensor, Tensor]:
    """Akk (strictly lower triangular) and Aqk (lower triangular), [M, H, C, C]; zeros elsewhere.

    Args:
        q, k, E: [M, H, C, K].
        product: the function for matrix products.
    """
    C = q.shape[-2]
    Akk, Aqk = (q.new_zeros(*q.shape[:-1], C) for _ in range(2))
    for h, f in decay.anchored.items():
        kh, qh = _halves(k * f, h), _halves(q * f, h)[..., 1, :, :]
        rows = torch.cat([kh[..., 1, :, :], qh], -2)
        kk, qk = product(rows, kh[..., 0, :, :].mT).chunk(2, -2)
        _blocks(Akk, h).copy_(kk)
        _blocks(Aqk, h).copy_(qk)
    ql, kl = _leaves(q), _leaves(k)
    for d, w in enumerate(_windows(E)):
        kj = kl[..., : LEAF - d, :] * w if d else kl
        _offset(Aqk, d).copy_((ql[..., d:, :] * kj).sum(-1))
        if d:
            _offset(Akk, d).copy_((kl[..., d:, :] * kj).sum(-1))
    return Akk, Aqk


def pair_gradients(
    q: Tensor, k: Tensor, E: Tensor, decay: Decays, dAkk: Tensor, dAqk: Tensor, product: Product
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and g = log E, each [M, H, C, K], through `pair_scores`.

    dAkk is strictly lower triangular, dAqk lower triangular. The gradient of g_t is the sum over all pairs whose decay
    contains E_t; in a block these are the rows from t on, or the columns before t. The sums have no subtraction, so
    nothing cancels.
    """
    diagonal = dAqk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dk, dg = diagonal * k, diagonal * q, torch.zeros_like(k)
    for h, f in decay.anchored.items():
        qh, kh, fh = _halves(q * f, h), _halves(k * f, h), _halves(f, h)
        fI, fJ = fh[..., 1, :, :], fh[..., 0, :, :]
        both = torch.cat([_blocks(dAkk, h), _blocks(dAqk, h)], -2)  # [..., 2h rows of k over q, h]
        b, a = (product(both, kh[..., 0, :, :]) * fI.repeat(1, 1, 1, 2, 1)).chunk(2, -2)
        c = product(both.mT, torch.cat([kh[..., 1, :, :], qh[..., 1, :, :]], -2)) * fJ
        _halves(dq, h)[..., 1, :, :] += a
        _halves(dk, h)[..., 1, :, :] += b
        _halves(dk, h)[..., 0, :, :] += c
        through = _halves(dg, h)
        through[..., 1, :, :] += from_here(_halves(q, h)[..., 1, :, :] * a + _halves(k, h)[..., 1, :, :] * b)
        through[..., 0, :, :] += before_here(_halves(k, h)[..., 0, :, :] * c)
    _leaf_gradients(q, k, E, dAkk, dAqk, dq, dk, dg)
    return dq, dk, dg


def _leaf_gradients(
    q: Tensor, k: Tensor, E: Tensor, dAkk: Tensor, dAqk: Tensor, dq: Tensor, dk: Tensor, dg: Tensor
) -> None:
    """Adds the pairs inside leaves to dq, dk and dg.

    The decay of a pair (i, i - d) contains the d gates between the two tokens. The loop starts with the pairs that are
    farthest apart. It adds each window's sum to the window's last gate, and `carried` adds it to the window that is one
    token shorter, which contains the other gates.
    """
    ql, kl, dql, dkl, dgl = (_leaves(x) for x in (q, k, dq, dk, dg))
    windows = _windows(E)
    carried = None
    for d in range(LEAF - 1, 0, -1):
        w = windows[d]
        qk, kk = _offset(dAqk, d).unsqueeze(-1), _offset(dAkk, d).unsqueeze(-1)
        kj = kl[..., : LEAF - d, :] * w
        row = qk * ql[..., d:, :] + kk * kl[..., d:, :]
        dql[..., d:, :] += qk * kj
        dkl[..., d:, :] += kk * kj
        dkl[..., : LEAF - d, :] += w * row
        pairs = kj * row
        if carried is not None:
            pairs[..., :-1, :] += carried
        dgl[..., d:, :] += pairs
        carried = pairs


def from_here(x: Tensor) -> Tensor:
    """sum_{i >= t} x_i for each token t, [..., C, K]."""
    C = x.shape[-2]
    return torch.ones(C, C, dtype=x.dtype, device=x.device).triu() @ x


def before_here(x: Tensor) -> Tensor:
    """sum_{j < t} x_j for each token t, [..., C, K]."""
    C = x.shape[-2]
    return torch.ones(C, C, dtype=x.dtype, device=x.device).tril(-1) @ x
