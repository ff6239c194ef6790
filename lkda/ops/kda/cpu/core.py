"""KDA on a CPU: calls of recurrence.cpp, as custom ops with fake implementations and autograd.

The recurrence takes a third of the operations of the chunked form. The chunked form turns them into matrix products,
which a GPU needs; a core of a CPU runs the recurrence near its peak, with the state in its first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.cpp import NAMES, Library, cpu_only
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.sequences import bounds_of

LIBRARY = Library(Path(__file__).with_name("recurrence.cpp"))
EVERY = 16  # as in the .cpp file: tokens from one saved state to the next

reason_cannot_run = cpu_only(LIBRARY, otherwise="chunk")


def _sizes(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int, int]:
    """N, H, K, V and the number of rows (tokens) of the call."""
    B, T, H, K = q.shape
    return B if cu_seqlens is None else cu_seqlens.shape[0] - 1, H, K, v.shape[3], B * T


def _results(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised o, final_state, and the memory for the saved states."""
    N, H, K, V, rows = _sizes(q, v, cu_seqlens)
    lanes = LIBRARY.call(f"kda_lanes_{NAMES[v.dtype]}")
    slots = rows // EVERY + N if save else 0
    saved = v.new_empty(slots, H, -(-V // lanes), K, lanes)
    return torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(N, H, K, V), saved


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final_state, and with `save` the states that the backward starts from. All tensors are of one dtype."""
    q, k, v, E, beta = (x.contiguous() for x in (q, k, v, g.exp(), beta))
    initial_state = None if initial_state is None else initial_state.contiguous()
    o, final_state, saved = _results(q, v, cu_seqlens, save)
    sizes = (bounds_of(q.shape[0], q.shape[1], cu_seqlens), *_sizes(q, v, cu_seqlens))
    inputs = (*sizes, q, k, v, E, beta, scale, initial_state)
    LIBRARY.call(
        f"kda_forward_{NAMES[v.dtype]}", *inputs, o, final_state, saved if save else None, torch.get_num_threads()
    )
    return o, final_state, saved


def _backward(
    grad_o: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the initial state."""
    q, k, v, E, beta, grad_o = (x.contiguous() for x in (q, k, v, g.exp(), beta, grad_o))
    grad_final = None if grad_final is None else grad_final.contiguous()
    sizes = _sizes(q, v, cu_seqlens)
    blocks = saved.shape[2]
    dq, dk, dg = (q.new_empty(blocks, *q.shape) for _ in range(3))
    dv, dbeta = torch.empty_like(v), beta.new_empty(blocks, *beta.shape)
    dinitial = v.new_empty(sizes[0], *sizes[1:4])
    inputs = (bounds_of(q.shape[0], q.shape[1], cu_seqlens), *sizes, q, k, v, E, beta, scale, grad_o, grad_final, saved)
    LIBRARY.call(f"kda_backward_{NAMES[v.dtype]}", *inputs, dq, dk, dv, dg, dbeta, dinitial, torch.get_num_threads())
    dq, dk, dg, dbeta = (x[0] if blocks == 1 else x.sum(0) for x in (dq, dk, dg, dbeta))
    return dq, dk, dv, dg, dbeta, dinitial


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "kda_cpu_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale, bool save) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "kda_cpu_backward(Tensor grad_o, Tensor? grad_final, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,"
    " Tensor? cu_seqlens, Tensor saved, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("kda_cpu_forward", _forward, "CPU")
_library.impl("kda_cpu_backward", _backward, "CPU")


@torch.library.register_fake("lkda::kda_cpu_forward", lib=_library)
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, save):
    return _results(q, v, cu_seqlens, save)


@torch.library.register_fake("lkda::kda_cpu_backward", lib=_library)
def _(grad_o, grad_final, q, k, v, g, beta, cu_seqlens, saved, scale):
    N, H, K, V, _ = _sizes(q, v, cu_seqlens)
    return (*(x.new_empty(x.shape) for x in (q, k, v, g, beta)), v.new_empty(N, H, K, V))


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, save = inputs
    if not save:
        raise RuntimeError("lkda::kda_cpu_forward needs save=True where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.wants_initial = scale, initial_state is not None
    ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, output[2])


def _gradients(ctx, grad_o, grad_final, grad_saved):
    q, k, v, g, beta, cu_seqlens, saved = ctx.saved_tensors
    grad_o = torch.zeros_like(v) if grad_o is None else grad_o
    backward: Callable = _backward if can_bypass_dispatcher(grad_o) else torch.ops.lkda.kda_cpu_backward
    *grads, d_initial = backward(grad_o, grad_final, q, k, v, g, beta, cu_seqlens, saved, ctx.scale)
    return *grads, d_initial if ctx.wants_initial else None, None, None, None


torch.library.register_autograd("lkda::kda_cpu_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(_forward, _save, _gradients, results=2)


def kda_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence in C++, differentiable. Arguments and results are those of `kda_attention`."""
    dtype = compute_dtype(v)
    inputs = [None if x is None else x.to(dtype) for x in (q, k, v, g, beta, initial_state)]
    save = wants_gradient(*inputs)
    forward: Callable = torch.ops.lkda.kda_cpu_forward
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if save else _forward
    o, final_state, _ = forward(*inputs, cu_seqlens, scale, save)
    return o.to(v.dtype), final_state
