"""Calls of rows.cpp. There are no gradients, and the arguments are not checked: `can_take` says what fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.cpp import NAMES, Library

LIBRARY = Library(Path(__file__).with_name("rows.cpp"))
# Of more rows, the matrix products of PyTorch are faster.
MOST_ROWS = 64

PLAIN, NORM, SILU, TIMES = range(4)  # as in the .cpp file


can_take = LIBRARY.can_take


def embed_rows(tokens: Tensor, table: Tensor, *, norm: Tensor | None, eps: float, scale: float) -> Tensor:
    """tokens [B] -> the rows of `table` [V, n], with an RMSNorm of weight `norm` [n] where it is given, times scale.

    Raises: ValueError for a token that the table lacks.
    """
    y = table.new_empty(len(tokens), table.shape[1])
    arguments = (*y.shape, tokens, len(table), table, norm, eps, float(scale), y)
    if LIBRARY.call(f"embed_{NAMES[table.dtype]}", *arguments):
        raise InputError(f"tokens must be from 0 to {len(table) - 1}, got {tokens.tolist()}.")
    return y


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMSNorm of x over its last dimension: [B, n], or heads [B, H, n]; x[b] is contiguous."""
    y = x.new_empty(x.shape)
    heads = x.shape[1] if x.dim() == 3 else 1
    LIBRARY.call(f"norm_{NAMES[x.dtype]}", len(x), heads, x.shape[-1], x, x.stride(0), weight, eps, y)
    return y


def add_rows(a: Tensor, b: Tensor) -> Tensor:
    """a + b, of one shape and contiguous."""
    y = a.new_empty(a.shape)
    LIBRARY.call(f"add_{NAMES[a.dtype]}", a.numel(), a, b, y)
    return y


def convolve_rows(x: Tensor, weight: Tensor, cache: Tensor) -> Tensor:
    """One token of a short convolution with SiLU. The cache is changed in place.

    Args:
        x: [B, channels], whose rows may lie apart.   weight: [channels, 1, width].   cache: [B, width - 1, channels].
    """
    y = x.new_empty(x.shape)
    LIBRARY.call(f"convolve_{NAMES[x.dtype]}", *x.shape, weight.shape[2], x, x.stride(0), weight, cache, y)
    return y


def product_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    form: int = PLAIN,
    norm: Tensor | None = None,
    eps: float = 0.0,
    other: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Linear layers of one input, side by side: z [B, n] times each of `weights` transposed, [B, sum of outputs].

    Args:
        x: [B, n], whose rows may lie apart.
        weights: [outputs, n] each, contiguous.
        form: what z is. PLAIN: x. NORM: the RMSNorm of x in groups of the size of `norm`, times sigmoid(other) where
            `other` is given. SILU: SiLU(x) times other. TIMES: x times other.
        other: [B, n], whose rows may lie apart.
        add: [B, sum of outputs], contiguous, added to the result.
    """
    B, n = x.shape
    sizes = torch.Size(len(weight) for weight in weights)
    y = x.new_empty(B, sum(sizes))
    LIBRARY.call(
        f"product_{NAMES[x.dtype]}",
        *(B, n, x, x.stride(0), form, norm, n if norm is None else len(norm), eps),
        *(other, 0 if other is None else other.stride(0), len(weights), list(weights), sizes),
        *(add, y, torch.get_num_threads()),
    )
    return y
