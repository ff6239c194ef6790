"""The decoding step of a layer of simplified linear attention on a GPU: one launch, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.dispatch import can_bypass_dispatcher
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, cannot_take, float32_or, readable

MAX_TAPS = 4
# Few, so that one sequence of a small model has blocks for several multiprocessors.
THREADS = 64
_NONE = (None, None, None)

reason_cannot_run = cannot_take(otherwise="torch", head_dims=None)


@cache
def fused_step_kernel(dtype: torch.dtype, weight: torch.dtype, cache_dtype: torch.dtype) -> Kernel:
    types = {"ELEMENT": ELEMENTS[dtype], "WEIGHT": ELEMENTS[weight], "CACHE": ELEMENTS[cache_dtype]}
    module = Module(Path(__file__).with_name("fused_step.cu"), {**types, "THREADS": THREADS})
    return module.kernel("simplified_fused_step", "P" * 13 + "i" * 8, overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant: q, k and v of each dtype; filters and caches in float32 or that dtype."""
    kinds = {dtype: dict.fromkeys((torch.float32, dtype)) for dtype in ELEMENTS}
    return [fused_step_kernel(dtype, *both) for dtype in ELEMENTS for both in product(kinds[dtype], repeat=2)]


def _rows(x: Tensor) -> Tensor:
    """x [B, ...] as [B, channels], whose rows are contiguous; copied where they are not."""
    rows = x.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    bias: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
) -> Tensor:
    B, H, D = q.shape
    o = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    rows = [_rows(x) for x in (q, k, v)]
    logits = None if logits is None else _rows(logits)
    strides = *(x.stride(0) for x in rows), 0 if logits is None else logits.stride(0)
    wide_logits = int(logits is not None and logits.dtype == torch.float32)
    kinds = [xs[0].dtype if xs else torch.float32 for xs in (weights, caches)]
    fused_step_kernel(q.dtype, *kinds)(
        (B * -(-H * D // THREADS), 1, 1),
        THREADS,
        *(*rows, logits, readable(bias), *(weights or _NONE), *(caches or _NONE), state, o),
        *(H * D, D, *strides, wide_logits, weights[0].shape[-1] if weights else 0),
        device=q.device,
    )
    return o


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "simplified_fused_step(Tensor q, Tensor k, Tensor v, Tensor? logits, Tensor bias, Tensor(a!) state, "
    "Tensor[] weights, Tensor(b!)[] caches) -> Tensor"
)
_library.impl("simplified_fused_step", _step, "CUDA")


@torch.library.register_fake("lkda::simplified_fused_step", lib=_library)
def _(q, *rest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def simplified_step_fused_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    bias: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
) -> Tensor:
    """The kernel. The arguments are those of `simplified_step_fused`, already checked.

    The kernel takes logits, filters and caches in float32 and in q's dtype. Others are cast to float32. A cache that
    was cast is updated in the copy, which is then copied back.
    """
    dtype, given = q.dtype, caches
    filters, caches = ([float32_or(dtype, x) for x in xs] for xs in (weights, caches))
    if logits is not None and logits.dtype not in (torch.float32, dtype):
        logits = logits.float()
    inputs = (q, k, v, logits, bias.float(), state)
    bypass = can_bypass_dispatcher(*inputs, *filters, *caches)
    step: Callable = _step if bypass else torch.ops.lkda.simplified_fused_step
    o: Tensor = step(*inputs, filters, caches)
    for before, after in zip(given, caches):
        if before is not after:
            before.copy_(after)
    return o
