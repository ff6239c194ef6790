"""The embedding, the norms and the sums of a decoding step: in C++ on a CPU, elsewhere in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.ops.rows.cpu import add_rows, can_take, embed_rows, norm_rows


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """norm(x) of x [B, d_model]."""
    if norm.eps is not None and x.is_contiguous() and can_take(x, norm.weight):
        return norm_rows(x, norm.weight, norm.eps)
    y: Tensor = norm(x)
    return y


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape."""
    if x.is_contiguous() and y.is_contiguous() and can_take(x, y):
        return add_rows(x, y)
    return x + y


def embedded(tokens: Tensor, table: Tensor, norm: nn.RMSNorm | None, scale: float) -> Tensor | None:
    """tokens [B] -> scale times the norm of their rows of `table`; None where the C++ cannot do it."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    usual = tokens.dim() == 1 and tokens.dtype == torch.int64 and tokens.is_contiguous()
    if not usual or eps is None or not can_take(table, table, *(() if weight is None else (weight,))):
        return None
    return embed_rows(tokens, table, norm=weight, eps=eps, scale=scale)
