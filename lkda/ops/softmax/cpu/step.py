"""Attention of one token to preallocated caches on a CPU: calls of step.cpp. There are no gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.cpp import NAMES, Library

LIBRARY = Library(Path(__file__).with_name("step.cpp"))

runs = LIBRARY.can_take


def softmax_step_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frequencies: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor | None:
    """Rotates q and k, appends k and v to the caches, and attends to them. Caches and length are changed in place.

    Args:
        q, k, v: [B, H, D], whose rows may lie apart.
        frequencies: [D / 2], of the rotation.
        keys, values: [B, H, S, D], whose entries [S, D] lie side by side.
        length: int64 [B, 1], the entries that are filled.
        q_norm, k_norm: [D], the weights of RMSNorms before the rotation, with `eps`.
    Returns: o [B, H, D]; None if a cache is full, and nothing is changed then.
    """
    B, H, D = q.shape
    o = q.new_empty(B, H, D)
    full = LIBRARY.call(
        f"softmax_step_{NAMES[q.dtype]}",
        *(B, H, D, q, k, v, q.stride(0), k.stride(0), v.stride(0), q_norm, k_norm, eps, frequencies),
        *(keys, values, keys.stride(0), keys.stride(1), keys.shape[2], length),
        *(D**-0.5, o, torch.get_num_threads()),
    )
    return None if full else o


def latent_step_cpu(
    q: Tensor,
    latent: Tensor,
    shared: Tensor,
    *,
    norm: Tensor,
    eps: float,
    projection: Tensor,
    latents: Tensor,
    shareds: Tensor,
    length: Tensor,
) -> Tensor | None:
    """Appends the latent and the shared key channels to the caches, and attends to them, in place as above.

    Args:
        q: [B, H, nope + rope], latent: [B, rank] before its RMSNorm, and shared: [B, rope]; rows may lie apart.
        norm: [rank], the weight of that norm.
        projection: [H * (nope + v_dim), rank], from the latent to the keys without the shared channels, and values.
        latents: [B, S, rank] and shareds: [B, S, rope], whose entries lie side by side.
        length: as above.
    Returns: o [B, H, v_dim]; None as above.
    """
    B, H, K = q.shape
    rank, rope = latent.shape[1], shared.shape[1]
    v_dim = len(projection) // H - (K - rope)
    o = q.new_empty(B, H, v_dim)
    full = LIBRARY.call(
        f"latent_step_{NAMES[q.dtype]}",
        *(B, H, K - rope, rope, rank, v_dim, q, latent, shared, q.stride(0), latent.stride(0), shared.stride(0)),
        *(norm, eps, projection, latents, shareds, latents.stride(0), shareds.stride(0), latents.shape[1], length),
        *(K**-0.5, o, torch.get_num_threads()),
    )
    return None if full else o
