"""KDA's decoding step on a GPU: one launch a layer, in place. docs/dev/decoding.md explains the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.dispatch import goes_straight
from lkda.ops.runtime.jit import Kernel, Module, multiprocessors
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take, readable

STATES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.int8: "int8"}
MOST_TAPS = 4
_NONE = (None, None, None)
# Rows of K that threads hold side by side; each takes every GROUPS-th.
GROUPS = {torch.float32: 8, torch.bfloat16: 16, torch.int8: 16}
# Threads that a multiprocessor should hold: registers for one state a block, while shared memory receives the next.
THREADS = {torch.float32: 512, torch.bfloat16: 512, torch.int8: 384}


reason_cannot_run = cannot_take(otherwise="plain")


def _threads(head_dim: int, state: torch.dtype) -> int:
    return GROUPS[state] * head_dim * state.itemsize // 16


def _resident(head_dim: int, state: torch.dtype) -> int:
    """Blocks that a multiprocessor should hold."""
    return min(16, THREADS[state] // _threads(head_dim, state))


@cache
def step_kernel(head_dim: int, dtype: torch.dtype, state: torch.dtype) -> Kernel:
    groups = GROUPS[state]
    shared_bytes = 4 * head_dim * (32 + 2 * groups) + head_dim**2 * state.itemsize
    types = {"ELEMENT": ELEMENTS[dtype], "STATE": STATES[state]}
    sizes = {"HEAD_DIM": head_dim, "GROUPS": groups, "RESIDENT": _resident(head_dim, state)}
    module = Module(Path(__file__).with_name("step.cu"), {**sizes, **types, "SHARED_BYTES": shared_bytes})
    return module.kernel("kda_step", "P" * 16 + "iiiiiiiifff", shared_bytes=shared_bytes)


def kernels(arch: str) -> list[Kernel]:
    """Every kernel, for every head size, dtype and state (the same on all architectures)."""
    return [step_kernel(D, dtype, state) for D in HEAD_DIMS for dtype in ELEMENTS for state in STATES]


def _castless(x: Tensor, dtype: torch.dtype) -> Tensor:
    return readable(x if x.dtype in (torch.float32, dtype) else x.float())


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
    inputs = (x if x is None else readable(x) for x in (q, k, v, gate_logits, beta_logits, a_log, dt_bias))
    filters: Sequence[Tensor | None] = weights or _NONE
    width = weights[0].shape[-1] if weights else 0
    wide = [int(bool(xs) and xs[0].dtype == torch.float32) for xs in (weights, caches)]
    units, room = B * H, multiprocessors(q.device) * _resident(D, state.dtype)
    step_kernel(D, q.dtype, state.dtype)(
        (min(units, room), 1, 1),
        _threads(D, state.dtype),
        *(*inputs, *filters, *(caches or _NONE), state, factors, o, units, H, width, *wide, int(normalize)),
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
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    *,
    normalize: bool,
    bounded: bool,
    lower_bound: float,
    strength: float,
    scale: float,
) -> Tensor:
    """The kernel; arguments as in `kda_step_fused`, validated. Parameters and caches may be in float32 or in q's dtype;
    others are cast, and so are updated by way of a copy."""
    dtype, kept = q.dtype, caches
    filters, caches = ([_castless(x, dtype) for x in xs] for xs in (weights, caches))
    inputs = (
        *(q, k, v, None if gate_logits is None else gate_logits.to(dtype), beta_logits.to(dtype)),
        *(None if x is None else x.float() for x in (A_log, dt_bias)),
        *(state, factors),
    )
    step: Callable = _step if goes_straight(*inputs, *filters, *caches) else torch.ops.lkda.kda_step
    o = step(*inputs, filters, caches, normalize, bounded, lower_bound, strength, scale)
    for before, after in zip(kept, caches):
        if before is not after:
            before.copy_(after)
    return o
