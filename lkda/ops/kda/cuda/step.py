"""KDA's decoding step on a GPU: one launch per layer, in place. docs/guides/generating.md explains the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.kda.reference.gate import KDAGate
from lkda.ops.runtime.dispatch import can_bypass_dispatcher
from lkda.ops.runtime.jit import Kernel, Module, multiprocessors
from lkda.ops.runtime.kernel_inputs import (
    ELEMENTS,
    HEAD_DIMS,
    cannot_take,
    float32_or,
    in_rows,
    readable,
    readable_rows,
)

STATES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int8: "int8"}
MAX_TAPS = 4
_NONE = (None, None, None)
# The number of rows of K that the threads of a block hold at a time; each thread takes every GROUPS-th row.
GROUPS = {torch.float32: 8, torch.bfloat16: 16, torch.int8: 16}
# Threads that a multiprocessor should hold. Each block has one state in registers and the next one in shared memory.
THREADS = {torch.float32: 512, torch.bfloat16: 512, torch.int8: 384}


reason_cannot_run = cannot_take(otherwise="torch")


def _threads(head_dim: int, state: torch.dtype) -> int:
    return GROUPS[state] * head_dim * state.itemsize // 16


def _resident(head_dim: int, state: torch.dtype) -> int:
    """The number of blocks that a multiprocessor should hold."""
    return min(16, THREADS[state] // _threads(head_dim, state))


@cache
def step_kernel(head_dim: int, dtype: torch.dtype, state: torch.dtype) -> Kernel:
    groups = GROUPS[state]
    shared_bytes = 4 * head_dim * (32 + 2 * groups) + head_dim**2 * state.itemsize
    types = {"ELEMENT": ELEMENTS[dtype], "STATE": STATES[state]}
    sizes = {"HEAD_DIM": head_dim, "GROUPS": groups, "RESIDENT": _resident(head_dim, state)}
    module = Module(Path(__file__).with_name("step.cu"), {**sizes, **types, "SHARED_BYTES": shared_bytes})
    return module.kernel("kda_step", "P" * 16 + "iiiiiiiiiiifff", shared_bytes=shared_bytes, overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant: each head size, dtype and state dtype. They are the same on all architectures."""
    return [step_kernel(D, dtype, state) for D in HEAD_DIMS for dtype in ELEMENTS for state in STATES]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    a_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    normalize: bool,
    bounded: bool,
    lower_bound: float,
    strength: float,
    scale: float,
) -> Tensor:
    B, H, D = q.shape
    o = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    q, k, v = in_rows(q, k, v)
    gate_logits, beta_logits = None if gate_logits is None else readable_rows(gate_logits), readable_rows(beta_logits)
    a_log, dt_bias = (x if x is None else readable(x) for x in (a_log, dt_bias))
    strides = q.stride(0), 0 if gate_logits is None else gate_logits.stride(0), beta_logits.stride(0)
    filters: Sequence[Tensor | None] = weights or _NONE
    width = weights[0].shape[-1] if weights else 0
    wide = [int(bool(xs) and xs[0].dtype == torch.float32) for xs in (weights, caches)]
    items, room = B * H, multiprocessors(q.device) * _resident(D, state.dtype)
    step_kernel(D, q.dtype, state.dtype)(
        (min(items, room), 1, 1),
        _threads(D, state.dtype),
        *(q, k, v, gate_logits, beta_logits, a_log, dt_bias, *filters, *(caches or _NONE), state, factors, o),
        *(items, H, *strides, width, *wide, int(normalize)),
        *(int(gate_logits is not None and gate_logits.dim() == 2), int(bounded), lower_bound, strength, scale),
        device=q.device,
    )
    return o


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "kda_step(Tensor q, Tensor k, Tensor v, Tensor? gate_logits, Tensor beta_logits, Tensor? a_log, Tensor? dt_bias, "
    "Tensor(a!) state, Tensor(b!)? factors, Tensor[] weights, Tensor(c!)[] caches, "
    "bool normalize, bool bounded, float lower_bound, float strength, float scale) -> Tensor"
)
_library.impl("kda_step", _step, "CUDA")


@torch.library.register_fake("lkda::kda_step", lib=_library)
def _(q, *rest):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def kda_step_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    gate: KDAGate,
    state: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The kernel. The arguments are those of `kda_step_fused`, already checked.

    The kernel takes weights and caches in float32 and in q's dtype. Others are cast. A cache that was cast is updated
    in the copy, which is then copied back.
    """
    dtype, given = q.dtype, caches
    filters, caches = ([float32_or(dtype, x) for x in xs] for xs in (weights, caches))
    inputs = (
        *(q, k, v, None if gate_logits is None else gate_logits.to(dtype), beta_logits.to(dtype)),
        *(None if x is None else x.float() for x in (gate.A_log, gate.dt_bias)),
        *(state, factors),
    )
    step: Callable = _step if can_bypass_dispatcher(*inputs, *filters, *caches) else torch.ops.lkda.kda_step
    o = step(*inputs, filters, caches, normalize, gate.bounded, gate.lower_bound, gate.strength, scale)
    for before, after in zip(given, caches):
        if before is not after:
            before.copy_(after)
    return o
