"""The embedding, the norms and the sums of a decoding step: in C++ on a CPU, elsewhere in PyTorch.

Modules that have been replaced by others, or have hooks, are called.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from lkda.models.linear import has_hooks
from lkda.ops.rows.cpu import add_rows, can_take, embed_rows, norm_rows


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """norm(x) of x [B, d_model], or of heads [B, H, D]."""
    if is_plain_norm(norm) and len(x) and x[0].is_contiguous() and can_take(x, norm.weight):
        assert norm.eps is not None
        return norm_rows(x, norm.weight, norm.eps)
    y: Tensor = norm(x)
    return y


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.RMSNorm]:
    """Whether a call of `norm` is an RMSNorm with its weight and nothing else."""
    return is_rms_norm(norm) and norm.weight is not None


def is_rms_norm(norm: nn.Module) -> TypeGuard[nn.RMSNorm]:
    """Whether a call of `norm` is an RMSNorm and nothing else; it may have no weight."""
    return type(norm) is nn.RMSNorm and norm.eps is not None and not has_hooks(norm)


def added(x: Tensor, y: Tensor) -> Tensor:
    """x + y of one shape."""
    if x.is_contiguous() and y.is_contiguous() and can_take(x, y):
        return add_rows(x, y)
    return x + y


def embedded(tokens: Tensor, embed: nn.Module, norm: nn.Module | None, scale: float) -> Tensor | None:
    """tokens [B] -> scale times the norm of their rows of the table; None where the C++ cannot do it."""
    if type(embed) is not nn.Embedding or has_hooks(embed) or not (norm is None or is_plain_norm(norm)):
        return None
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    usual = tokens.dim() == 1 and tokens.dtype == torch.int64 and tokens.is_contiguous()
    if not usual or not can_take(embed.weight, embed.weight, *(() if weight is None else (weight,))):
        return None
    assert eps is not None
    return embed_rows(tokens, embed.weight, norm=weight, eps=eps, scale=scale)
