"""KDA on tensor cores: the kernels' launches, as custom ops with fakes and autograd. docs/dev/kernels.md explains them.

Forward: `prepare.cu` (all chunks at once: everything that does not need the state), then `scan.cu` (chunk after chunk:
state and output). Backward: `reverse.cu` (chunk after chunk, backwards: the state's gradient), then `gradients.cu` (all
chunks at once). For the backward the forward keeps the packets, which only `reverse.cu` needs and which are freed
before the gradients are made; the state entering each chunk; and N~.

Where q and k are to be normalised, that is part of the op: half-precision ones are then float16 to the kernels, as the
gradients of A_log and dt_bias, sums over all tokens, show what bfloat16 rounds away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.kda.cuda.plan import Plan, plan_of, sizes_of
from lkda.ops.runtime.dispatch import goes_straight, straight, wants_gradient
from lkda.ops.runtime.kernel_inputs import cannot_take, readable
from lkda.ops.short_conv.cuda import unit_dtype, unit_vectors, unit_vectors_backward

reason_cannot_run = cannot_take(otherwise="chunk")


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _scratch(plan: Plan) -> tuple[Tensor, int, int, int]:
    """The memory of three arrays [N * segments, H, K, V] in float32, and their addresses."""
    memory = torch.empty(3 * plan.state_numbers, dtype=torch.float32, device=plan.device)
    start, size = memory.data_ptr(), 4 * plan.state_numbers
    return memory, start, start + size, start + 2 * size


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """o, final_state, and where a backward follows (keep) packets, what `Sizes` says is kept, and where they have been
    made q and k of unit norm; else None."""
    _, T, H, _ = q.shape
    q, k = unit_vectors(q, k) if normalize else (readable(q), readable(k))
    v, g, beta = readable(v), readable(g), readable(beta)
    plan = plan_of(v, cu_seqlens, q.dtype)
    bounds, spans = plan.chunks(cu_seqlens)
    packets = _bytes(plan.packets, q.device)
    plan.prepare(q, k, g, beta, packets, spans, plan.items, T, H, scale)
    o, final_state = _results(v, cu_seqlens)
    kept = _bytes(plan.kept, q.device) if keep else None
    states, corrections, transitions, units = (None,) * 4 if kept is None else plan.kept_parts(kept)
    begins = (plan.find_largest(v, spans, packets), initial_state)
    where = (bounds, plan.sequences, T, H, plan.segments)
    enters: Tensor | int | None = initial_state
    if plan.segments > 1:
        _memory, offsets, transposed, enters = _scratch(plan)
        plan.summarize(packets, v, *begins, None, None, offsets, None, None, None, transposed, transitions, *where)
        plan.enter_segments(transposed, offsets, initial_state, enters, plan.segments, H, 0)
    plan.scan(packets, v, *begins, enters, o, final_state, states, corrections, units, None, None, *where)
    if not keep:
        return o, final_state, None, None, None, None
    return o, final_state, packets, kept, q if normalize else None, k if normalize else None


def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """`_forward` as an op may be: an empty tensor in the place of every None."""
    results = _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, keep)
    return tuple(_nothing(v) if x is None else x for x in results)


def _nothing(v: Tensor) -> Tensor:
    return v.new_empty(0, dtype=torch.float32)


def _results(v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """o and final_state, uninitialised."""
    B, _, H, D = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, torch.empty((N, H, D, D), dtype=torch.float32, device=v.device)


def _reverse(
    grad_o: Tensor,
    grad_final: Tensor | None,
    v: Tensor,
    cu_seqlens: Tensor | None,
    packets: Tensor,
    kept: Tensor,
    wants_initial: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradient of the initial state where it is wanted, and what `Sizes` says a `reverse` leaves."""
    _, T, H, _ = v.shape
    v, grad_o = readable(v), readable(grad_o)
    grad_final = None if grad_final is None else readable(grad_final)
    plan = plan_of(v, cu_seqlens)
    bounds, spans = plan.chunks(cu_seqlens)
    d_initial = _results(v, cu_seqlens)[1] if wants_initial else None
    d_kept = _bytes(plan.d_kept, v.device)
    where = (bounds, plan.sequences, T, H, plan.segments)
    ends = (plan.find_largest(grad_o, spans, d_kept), grad_final)
    leaves: Tensor | int | None = grad_final
    if plan.segments > 1:
        _memory, offsets, leaves, _ = _scratch(plan)
        plan.summarize_reverse(packets, None, grad_o, *ends, None, offsets, None, None, None, None, *where)
        plan.enter_segments(plan.kept_parts(kept)[2], offsets, grad_final, leaves, plan.segments, H, 1)
    d_states, d_corrections, products, d_units = plan.d_kept_parts(d_kept)
    plan.reverse(packets, v, grad_o, *ends, leaves, d_initial, d_states, d_corrections, d_units, products, *where)
    return d_initial, d_kept


def _reverse_op(*inputs) -> tuple[Tensor, Tensor]:
    """`_reverse` as an op may be."""
    d_initial, d_kept = _reverse(*inputs)
    return _nothing(d_kept) if d_initial is None else d_initial, d_kept


def _chunk_gradients(
    grad_o: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    d_kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, T, H, _ = q.shape
    q, k, g, beta, grad_o = readable(q), readable(k), readable(g), readable(beta), readable(grad_o)
    grad_final = None if grad_final is None else readable(grad_final)
    plan = plan_of(grad_o, cu_seqlens, q.dtype)
    _, spans = plan.chunks(cu_seqlens)
    grads = _gradients_of(grad_o, g, beta)
    states, corrections, _, units = plan.kept_parts(kept)
    d_states, d_corrections, products, d_units = plan.d_kept_parts(d_kept)
    passed = (states, corrections, d_states, d_corrections, products, units, d_units, initial_state, grad_final)
    plan.gradients(q, k, g, beta, grad_o, *passed, *grads, spans, T, H, scale)
    return grads


def _gradients_of(grad_o: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta, contiguous, uninitialised."""
    dq, dk, dv = (torch.empty_like(grad_o, memory_format=torch.contiguous_format) for _ in range(3))
    return (
        dq,
        dk,
        dv,
        torch.empty_like(g, memory_format=torch.contiguous_format),
        torch.empty_like(beta, memory_format=torch.contiguous_format),
    )


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "kda_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale, bool normalize, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "kda_reverse(Tensor grad_o, Tensor? grad_final, Tensor v, Tensor? cu_seqlens, Tensor packets, Tensor kept,"
    " bool wants_initial) -> (Tensor, Tensor)"
)
_library.define(
    "kda_gradients(Tensor grad_o, Tensor? grad_final, Tensor q, Tensor k, Tensor g, Tensor beta, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor kept, Tensor d_kept, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("kda_forward", _forward_op, "CUDA")
_library.impl("kda_reverse", _reverse_op, "CUDA")
_library.impl("kda_gradients", _chunk_gradients, "CUDA")


@torch.library.register_fake("lkda::kda_forward", lib=_library)
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, keep):
    if not keep:
        return *_results(v, cu_seqlens), *(_nothing(v) for _ in range(4))
    sizes = sizes_of(v, cu_seqlens)
    kept = (_bytes(sizes.packets, v.device), _bytes(sizes.kept, v.device))
    if not normalize:
        return *_results(v, cu_seqlens), *kept, _nothing(v), _nothing(v)
    units = (x.new_empty(x.shape, dtype=unit_dtype(x.dtype)) for x in (q, k))
    return *_results(v, cu_seqlens), *kept, *units


@torch.library.register_fake("lkda::kda_reverse", lib=_library)
def _(grad_o, grad_final, v, cu_seqlens, packets, kept, wants_initial):
    d_initial = _results(v, cu_seqlens)[1] if wants_initial else _nothing(kept)
    return d_initial, _bytes(sizes_of(v, cu_seqlens).d_kept, v.device)


@torch.library.register_fake("lkda::kda_gradients", lib=_library)
def _(grad_o, grad_final, q, k, g, beta, *rest):
    return _gradients_of(grad_o, g, beta)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, keep = inputs
    if not keep:
        raise RuntimeError("lkda::kda_forward needs keep=True where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.normalize = scale, normalize
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])


def _gradients(ctx, grad_o, grad_final, *grad_kept):
    q, k, v, g, beta, initial_state, cu_seqlens, packets, kept, *units = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()  # unless the graph is kept: from here on only this function holds them
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    straight = goes_straight(grad_o)
    reverse: Callable = _reverse if straight else torch.ops.lkda.kda_reverse
    gradients: Callable = _chunk_gradients if straight else torch.ops.lkda.kda_gradients
    wants_initial = initial_state is not None
    d_initial, d_kept = reverse(grad_o, grad_final, v, cu_seqlens, packets, kept, wants_initial)
    del packets  # their memory serves the gradients
    directions = units if ctx.normalize else (q, k)
    inputs = (*directions, g, beta, initial_state, cu_seqlens)
    dq, dk, *grads = gradients(grad_o, grad_final, *inputs, kept, d_kept, ctx.scale)
    if ctx.normalize:
        dq, dk = unit_vectors_backward(dq, dk, q, k)
    return dq, dk, *grads, d_initial if wants_initial else None, None, None, None, None


torch.library.register_autograd("lkda::kda_forward", _gradients, setup_context=_save, lib=_library)


_straight = straight(_forward, _save, _gradients, results=2)


def kda_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The chunked kernels, differentiable; arguments and results as in `kda_attention`.

    Args:
        normalize: whether q and k are to be divided by their norms.
    Raises: ValueError where K and V differ.
    """
    if k.shape[-1] != v.shape[-1]:
        raise InputError(
            f"kda_attention(backend='cuda'): K and V must be equal, got K = {k.shape[-1]} and V = {v.shape[-1]}; "
            "use backend='chunk'."
        )
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    inputs = (q, k, v, g, beta, initial_state)
    keep = wants_gradient(*inputs)
    forward: Callable = torch.ops.lkda.kda_forward
    if goes_straight(*inputs):
        forward = _straight if keep else _forward
    o, final_state, *_ = forward(q, k, v, g.float(), beta.float(), initial_state, cu_seqlens, scale, normalize, keep)
    return o, final_state
