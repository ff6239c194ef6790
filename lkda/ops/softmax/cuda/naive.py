"""Causal softmax attention in a kernel without tensor cores, forward only. Benchmarks use it to show what a naive
quadratic kernel costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take

THREADS = 256
QUERIES = THREADS // 32  # of a block: each warp has one

reason_cannot_run = cannot_take(otherwise="naive")


@cache
def naive_kernel(head_dim: int, dtype: torch.dtype) -> Kernel:
    defines: dict[str, str | int | float] = {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype], "THREADS": THREADS}
    return Module(Path(__file__).with_name("naive.cu"), defines).kernel("softmax_naive", "PPPPPiiiifq")


def kernels(arch: str) -> list[Kernel]:
    """Every variant: each head size and dtype. They are the same on all architectures."""
    return [naive_kernel(D, dtype) for D in HEAD_DIMS for dtype in ELEMENTS]


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    (B, T, H, D), S = q.shape, k.shape[1]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    o, rows = torch.empty_like(q), B * T * H
    sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    arguments = (q, k, v, o, cu_seqlens, sequences, T, S, H, scale, rows)
    naive_kernel(D, q.dtype)((-(-rows // QUERIES), 1, 1), THREADS, *arguments, device=q.device)
    return o


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("softmax_naive(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float scale) -> Tensor")
_library.impl("softmax_naive", _forward, "CUDA")


@torch.library.register_fake("lkda::softmax_naive", lib=_library)
def _(q, k, v, cu_seqlens, scale):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def softmax_cuda_naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int | None
) -> Tensor:
    """The kernel, without gradients. Arguments and result are those of `softmax_attention`; `longest` has no effect.

    Raises: ValueError if K and V differ, or if an input requires a gradient.
    """
    if q.shape[-1] != v.shape[-1]:
        raise InputError(
            f"softmax_attention(backend='cuda_naive'): K and V must be equal, got K = {q.shape[-1]} and "
            f"V = {v.shape[-1]}; use backend='sdpa'."
        )
    if wants_gradient(q, k, v):
        raise InputError(
            "softmax_attention(backend='cuda_naive') has no backward and an input requires a gradient; "
            "use backend='sdpa', or call it under torch.no_grad()."
        )
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    direct = can_bypass_dispatcher(q, k, v, cu_seqlens)
    forward: Callable[..., Tensor] = _forward if direct else torch.ops.lkda.softmax_naive
    return forward(q, k, v, cu_seqlens, scale)
