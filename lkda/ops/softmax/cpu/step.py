"""Attention of one token to preallocated caches on a CPU: calls of step.cpp. There are no gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.cpp import NAMES, Library, contiguous_rows, cpu_only
from lkda.ops.softmax.rotary import frequencies

LIBRARY = Library(Path(__file__).with_name("step.cpp"))

can_take = LIBRARY.can_take
reason_cannot_run = cpu_only(LIBRARY, otherwise="torch", dtypes=NAMES)


def softmax_step_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    rope_base: float | None,
    scale: float,
) -> Tensor:
    """Arguments and result as of `softmax_step`, already checked, and all of one dtype."""
    B, H, D = q.shape
    q, k, v = map(contiguous_rows, (q, k, v))
    o = q.new_empty(B, H, D)
    LIBRARY.call(
        f"softmax_step_{NAMES[q.dtype]}",
        *(B, H, D, q, k, v, q.stride(0), k.stride(0), v.stride(0)),
        *(frequencies(D, rope_base, q.dtype, q.device), k_cache, v_cache),
        *(k_cache.stride(0), k_cache.stride(1), k_cache.shape[2], lengths, float(scale), o, torch.get_num_threads()),
    )
    return o


def latent_step_cpu(
    q: Tensor,
    latent: Tensor,
    shared: Tensor,
    *,
    norm: Tensor,
    eps: float,
    projection: Tensor,
    rope_base: float | None,
    latents: Tensor,
    shareds: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Appends the latent and the shared key channels to the caches in place, and attends to them.

    Args:
        q: [B, H, nope + rope], latent: [B, rank] before its RMSNorm, and shared: [B, rope]; rows may lie apart.
        norm: [rank], the weight of that norm.
        projection: [H * (nope + v_dim), rank], from the latent to the keys without the shared channels, and values.
        rope_base: of the rotation of `shared` and of the last channels of q; None for none.
        latents: [B, S, rank] and shareds: [B, S, rope], whose entries lie side by side.
        lengths: int64 [B], contiguous, the entries that are filled before this token. They are not changed.
    Returns: o [B, H, v_dim].
    """
    B, H, K = q.shape
    rank, rope = latent.shape[1], shared.shape[1]
    v_dim = len(projection) // H - (K - rope)
    o = q.new_empty(B, H, v_dim)
    turning = None if rope_base is None else frequencies(rope, rope_base, q.dtype, q.device)
    LIBRARY.call(
        f"latent_step_{NAMES[q.dtype]}",
        *(B, H, K - rope, rope, rank, v_dim, q, latent, shared, q.stride(0), latent.stride(0), shared.stride(0)),
        *(norm, eps, projection, turning, latents, shareds, latents.stride(0), shareds.stride(0), latents.shape[1]),
        *(lengths, K**-0.5, o, torch.get_num_threads()),
    )
    return o


def is_full(lengths: Tensor, size: int) -> bool:
    """Whether one of the lengths, contiguous int64 on a CPU, is `size` or more. A recorded step has this call too."""
    return bool(LIBRARY.call("is_full", lengths.numel(), lengths, size))


def advance_(lengths: Tensor) -> None:
    """Adds one to the lengths, contiguous int64 on a CPU, in place."""
    LIBRARY.call("advance", lengths.numel(), lengths)
