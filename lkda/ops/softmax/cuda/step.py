"""Softmax attention's decoding step on a GPU: one launch per layer, two where few heads share a long cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.dispatch import can_bypass_dispatcher
from lkda.ops.runtime.jit import Kernel, Module, multiprocessors
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take, in_rows
from lkda.ops.softmax.rotary import frequencies

THREADS = 256
RESIDENT = 2  # blocks that a multiprocessor holds
# A cache of this many tokens or fewer is one part: a second launch would take longer.
WHOLE = 512
# The number of tokens of a part is a multiple of the first and at least the second. As far as MAX_SPLITS allows, it is
# at most the third, so that the blocks of sequences of unequal lengths end at about the same time.
MULTIPLE, LEAST, MOST = 128, 256, 4096
MAX_SPLITS = 64

reason_cannot_run = cannot_take(otherwise="torch")


@cache
def _module(head_dim: int, dtype: torch.dtype) -> Module:
    sizes = {"STEP_BYTES": _step_bytes(head_dim), "COMBINE_BYTES": _combine_bytes(head_dim), "MAX_SPLITS": MAX_SPLITS}
    return Module(Path(__file__).with_name("step.cu"), {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype], **sizes})


def _step_bytes(head_dim: int) -> int:
    return 4 * (3 * head_dim + THREADS // 32 * (head_dim + 2))


def _combine_bytes(head_dim: int) -> int:
    sets = THREADS // (head_dim // 4)
    return 4 * sets * (head_dim + 2)


@cache
def step_kernel(head_dim: int, dtype: torch.dtype) -> Kernel:
    module, shared_bytes = _module(head_dim, dtype), _step_bytes(head_dim)
    return module.kernel("softmax_step", "PPPPPPPPPiiiiiqqf", shared_bytes=shared_bytes, overlapping=True)


@cache
def combine_kernel(head_dim: int, dtype: torch.dtype) -> Kernel:
    module, shared_bytes = _module(head_dim, dtype), _combine_bytes(head_dim)
    return module.kernel("softmax_combine", "PPPiiii", shared_bytes=shared_bytes, overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant: each head size and dtype. They are the same on all architectures."""
    return [make(D, dtype) for D in HEAD_DIMS for dtype in ELEMENTS for make in (step_kernel, combine_kernel)]


def parts_of(items: int, tokens: int, room: int) -> tuple[int, int]:
    """The tokens of a part and the number of parts of each of `items` caches of `tokens` tokens, where `room` blocks
    run at a time."""
    wanted = max(room // items, -(-tokens // MOST))
    splits = 1 if tokens <= WHOLE else min(wanted, tokens // LEAST, MAX_SPLITS)
    if splits == 1:
        return tokens, 1
    part = -(-tokens // (splits * MULTIPLE)) * MULTIPLE
    return part, -(-tokens // part)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rope_base: float | None,
    scale: float,
) -> Tensor:
    (B, H, D), S = q.shape, k_cache.shape[2]
    o = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    q, k, v = in_rows(q, k, v)
    items = B * H
    part, splits = parts_of(items, S, RESIDENT * multiprocessors(q.device))
    sums = q.new_empty(items * splits * (D + 4), dtype=torch.float32) if splits > 1 else None
    step_kernel(D, q.dtype)(
        (items * splits, 1, 1),
        THREADS,
        *(q, k, v, frequencies(D, rope_base, torch.float32, q.device), lengths, k_cache, v_cache, o, sums),
        *(H, q.stride(0), S, part, splits, k_cache.stride(0), k_cache.stride(1), scale),
        device=q.device,
    )
    if splits > 1:
        arguments = (sums, lengths, o, H, S, part, splits)
        combine_kernel(D, q.dtype)((items, 1, 1), THREADS, *arguments, device=q.device)
    return o


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "softmax_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths, "
    "float? rope_base, float scale) -> Tensor"
)
_library.impl("softmax_step", _step, "CUDA")


@torch.library.register_fake("lkda::softmax_step", lib=_library)
def _(q, *rest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def softmax_step_cuda(
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
    """The kernels. The arguments are those of `softmax_step`, already checked."""
    direct = can_bypass_dispatcher(q, k, v, k_cache, v_cache, lengths)
    step: Callable[..., Tensor] = _step if direct else torch.ops.lkda.softmax_step
    return step(q, k, v, k_cache, v_cache, lengths, rope_base, scale)
