"""KDA on tensor cores: launches of the kernels, as custom ops with fake implementations and autograd.

docs/dev/kernels.md explains the kernels, docs/reference/mixers.md the notation.

    intra_chunk_fwd   all chunks in parallel: everything that does not depend on the state
    inter_chunk_fwd   one chunk after another: the state and the output
    inter_chunk_bwd   one chunk after another, from the last to the first: the gradient of the state
    intra_chunk_bwd   all chunks in parallel: the gradients of q, k, v, g and beta
    chunk_fwd         both kernels of the forward in one, for some shapes (`ONE_PASS`, `PAIR`, `PAIR_SAVES`)

The forward saves three things for the backward: the workspaces that intra_chunk_fwd writes, the state h that enters
each chunk, and v~ (v_new without its factor beta). Only inter_chunk_bwd reads the workspaces; they are freed before
intra_chunk_bwd allocates the gradients. With `recompute` they are not saved, and the backward runs intra_chunk_fwd
again, which gives the same bits.

The op itself can normalise q and k. In half precision the kernels then get them in float16, because the gradients of
A_log and dt_bias are sums over all tokens and would show the rounding of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.kda.cuda.plan import Launch, Plan, plan_of, sizes_of
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.kernel_inputs import cannot_take, readable
from lkda.ops.short_conv.cuda import normalize_heads, normalize_heads_backward, normalized_dtype

reason_cannot_run = cannot_take(otherwise="chunk")

# Whether chunk_fwd computes a forward that no backward follows, at the shapes where the plan has it (`Plan.chunk_fwd`).
# Its last bits need not be those of a forward that a backward follows. Tests and benchmarks set this to False to
# compare. ONE_PASS is for heads of 64, and PAIR for heads of 128, whose kernel is chunk_fwd_pair.cu.
ONE_PASS = True
PAIR = True
# Whether chunk_fwd_pair.cu computes a forward that a backward follows too (`Plan.chunk_fwd_saves`). It writes what
# the two kernels write for the backward, with the same bits.
PAIR_SAVES = True


def runs_in_one_kernel(D: int) -> bool:
    """Whether chunk_fwd computes forwards of heads of D at the shapes where the plan has it."""
    return PAIR if D == 128 else ONE_PASS


def empty_bytes(count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def _scratch(plan: Plan, H: int) -> tuple[Tensor, int, int, int, int | None]:
    """One allocation for three float32 arrays [N * segments, H, K, V] and an int32 array [N, H, segments], and the four
    addresses. The last is None for float32 inputs, whose chunks are not tested (see kda_forgetting.cuh). With
    optional segments only the first and the last array are there."""
    arrays = 1 if plan.optional else 3
    size_of_all = arrays * plan.state_numbers + plan.sequences * plan.segments * H
    memory = torch.empty(size_of_all, dtype=torch.float32, device=plan.device)
    start, size = memory.data_ptr(), 4 * plan.state_numbers
    return memory, start, start + size, start + 2 * size, start + arrays * size if plan.amax else None


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    save: bool,
    recompute: bool = False,
    workspaces: Tensor | None = None,
    recomputed: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns o and final_state; with `save` also the workspaces (not with `recompute`), the memory that `Sizes.saved`
    describes, and with `normalize` the normalised q and k. What is not returned is None. `workspaces` are those that
    `launch_workspaces` computed, if it has been called already. `recomputed`: whether a backward calls this function
    again with `save`, and must get the same bits."""
    _, T, H, _ = q.shape
    q, k = normalize_heads(q, k) if normalize else (readable(q), readable(k))
    v, g, beta = readable(v), readable(g), readable(beta)
    plan = plan_of(v, cu_seqlens, q.dtype)
    no_backward = not save and not recomputed and workspaces is None
    if runs_in_one_kernel(v.shape[-1]) and no_backward and plan.chunk_fwd is not None and T > 0:
        o, final_state = empty_results(v, cu_seqlens)
        plan.chunk_fwd(q, k, v, g, beta, initial_state, o, final_state, T, H, scale)
        return o, final_state, None, None, None, None
    if PAIR_SAVES and save and workspaces is None and plan.chunk_fwd_saves is not None and T > 0:
        results = launch_and_save(q, k, v, g, beta, initial_state, plan, plan.chunk_fwd_saves, scale, recompute)
        return *results, q if normalize else None, k if normalize else None
    bounds, spans = plan.chunks(cu_seqlens)
    if workspaces is None:
        workspaces = launch_intra_chunk_fwd(q, k, v, g, beta, plan, spans, scale)
    o, final_state = empty_results(v, cu_seqlens)
    saved = empty_bytes(plan.saved, q.device) if save else None
    states, v_tilde, transitions, v_scales = (None,) * 4 if saved is None else plan.saved_parts(saved)
    first = (plan.amax_in(workspaces), initial_state)
    shape = (bounds, plan.sequences, T, H, plan.segments, int(plan.optional))
    entering: Tensor | int | None = initial_state
    forgotten: int | None = None
    if plan.optional:
        _memory, entering, _, _, forgotten = _scratch(plan, H)
        plan.summarize_fwd(workspaces, v, *first, None, None, entering, *(None,) * 5, forgotten, *shape)
    elif plan.segments > 1:
        _memory, offsets, transposed, entering, forgotten = _scratch(plan, H)
        summary = (offsets, None, None, None, transposed, transitions, forgotten)
        plan.summarize_fwd(workspaces, v, *first, None, None, *summary, *shape)
        plan.segment_entries(transposed, offsets, initial_state, entering, forgotten, plan.segments, H, 0)
    outputs = (o, final_state, states, v_tilde, v_scales, None, None, forgotten)
    plan.inter_chunk_fwd(workspaces, v, *first, entering, *outputs, *shape)
    if not save:
        return o, final_state, None, None, None, None
    saved_workspaces = None if recompute else workspaces
    return o, final_state, saved_workspaces, saved, q if normalize else None, k if normalize else None


def launch_and_save(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    plan: Plan,
    launch: Launch,
    scale: float,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The first four results of `launch_forward` with `save`, by one kernel after that of the amax."""
    _, T, H, _ = q.shape
    o, final_state = empty_results(v, None)
    memory = empty_bytes(plan.amax if recompute else plan.workspaces, q.device)
    workspaces = None if recompute else memory
    amax = plan.find_amax(v, None, memory)
    saved = empty_bytes(plan.saved, q.device)
    states, v_tilde, _, v_scales = plan.saved_parts(saved)
    passed = (amax, workspaces, states, v_tilde, v_scales)
    launch(q, k, v, g, beta, initial_state, o, final_state, *passed, T, H, scale)
    return o, final_state, workspaces, saved


def launch_intra_chunk_fwd(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, plan: Plan, spans: Tensor | None, scale: float
) -> Tensor:
    """The workspaces, and after them the amax of v, see `Sizes.workspaces`."""
    workspaces = empty_bytes(plan.workspaces, q.device)
    plan.intra_chunk_fwd(q, k, v, g, beta, workspaces, spans, scale)
    return workspaces


def launch_workspaces(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """The workspaces of q and k, which are normalised, v, g and beta: for `launch_forward`, or for the backward after a
    forward with `recompute`."""
    q, k, v, g, beta = readable(q), readable(k), readable(v), readable(g), readable(beta)
    plan = plan_of(v, cu_seqlens, q.dtype)
    return launch_intra_chunk_fwd(q, k, v, g, beta, plan, plan.chunks(cu_seqlens)[1], scale)


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
    save: bool,
    recompute: bool,
) -> tuple[Tensor, ...]:
    """`launch_forward` as a custom op, which may not return None: an empty tensor stands for it."""
    results = launch_forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, save, recompute)
    return tuple(_nothing(v) if x is None else x for x in results)


def _nothing(v: Tensor) -> Tensor:
    return v.new_empty(0, dtype=torch.float32)


def empty_results(v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uninitialised o and final_state."""
    B, _, H, D = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, torch.empty((N, H, D, D), dtype=torch.float32, device=v.device)


def launch_inter_chunk_bwd(
    grad_o: Tensor,
    grad_final: Tensor | None,
    v: Tensor,
    cu_seqlens: Tensor | None,
    workspaces: Tensor,
    saved: Tensor,
    wants_initial: bool,
) -> tuple[Tensor | None, Tensor]:
    """Returns the gradient of the initial state (None unless `wants_initial`) and the memory that `Sizes.d_saved`
    describes."""
    _, T, H, _ = v.shape
    v, grad_o = readable(v), readable(grad_o)
    grad_final = None if grad_final is None else readable(grad_final)
    plan = plan_of(v, cu_seqlens)
    bounds, spans = plan.chunks(cu_seqlens)
    d_initial = empty_results(v, cu_seqlens)[1] if wants_initial else None
    d_saved = empty_bytes(plan.d_saved, v.device)
    shape = (bounds, plan.sequences, T, H, plan.segments, int(plan.optional))
    last = (plan.find_amax(grad_o, spans, d_saved), grad_final)
    leaving: Tensor | int | None = grad_final
    forgotten: int | None = None
    if plan.optional:
        _memory, leaving, _, _, forgotten = _scratch(plan, H)
        plan.summarize_bwd(workspaces, None, grad_o, *last, None, leaving, *(None,) * 4, forgotten, *shape)
    elif plan.segments > 1:
        _memory, offsets, leaving, _, forgotten = _scratch(plan, H)
        summary = (offsets, None, None, None, None, forgotten)
        plan.summarize_bwd(workspaces, None, grad_o, *last, None, *summary, *shape)
        transitions = plan.saved_parts(saved)[2]
        plan.segment_entries(transitions, offsets, grad_final, leaving, forgotten, plan.segments, H, 1)
    d_states, d_residual, beta_parts, do_scales = plan.d_saved_parts(d_saved)
    outputs = (d_initial, d_states, d_residual, do_scales, beta_parts, forgotten)
    plan.inter_chunk_bwd(workspaces, v, grad_o, *last, leaving, *outputs, *shape)
    return d_initial, d_saved


def _inter_chunk_bwd_op(*inputs) -> tuple[Tensor, Tensor]:
    """`launch_inter_chunk_bwd` as a custom op, which may not return None."""
    d_initial, d_saved = launch_inter_chunk_bwd(*inputs)
    return _nothing(d_saved) if d_initial is None else d_initial, d_saved


def launch_intra_chunk_bwd(
    grad_o: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    d_saved: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, T, H, _ = q.shape
    q, k, g, beta, grad_o = readable(q), readable(k), readable(g), readable(beta), readable(grad_o)
    grad_final = None if grad_final is None else readable(grad_final)
    plan = plan_of(grad_o, cu_seqlens, q.dtype)
    _, spans = plan.chunks(cu_seqlens)
    grads = _gradients_of(grad_o, g, beta)
    states, v_tilde, _, v_scales = plan.saved_parts(saved)
    d_states, d_residual, beta_parts, do_scales = plan.d_saved_parts(d_saved)
    passed = (states, v_tilde, d_states, d_residual, beta_parts, v_scales, do_scales, initial_state, grad_final)
    plan.intra_chunk_bwd(q, k, g, beta, grad_o, *passed, *grads, spans, plan.items, T, H, scale)
    return grads


def _gradients_of(grad_o: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised, contiguous gradients of q, k, v, g and beta."""
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
    " float scale, bool normalize, bool save, bool recompute) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "kda_workspaces(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? cu_seqlens, float scale) -> Tensor"
)
_library.define(
    "kda_inter_chunk_bwd(Tensor grad_o, Tensor? grad_final, Tensor v, Tensor? cu_seqlens, Tensor workspaces,"
    " Tensor saved, bool wants_initial) -> (Tensor, Tensor)"
)
_library.define(
    "kda_intra_chunk_bwd(Tensor grad_o, Tensor? grad_final, Tensor q, Tensor k, Tensor g, Tensor beta,"
    " Tensor? initial_state, Tensor? cu_seqlens, Tensor saved, Tensor d_saved, float scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("kda_forward", _forward_op, "CUDA")
_library.impl("kda_workspaces", launch_workspaces, "CUDA")
_library.impl("kda_inter_chunk_bwd", _inter_chunk_bwd_op, "CUDA")
_library.impl("kda_intra_chunk_bwd", launch_intra_chunk_bwd, "CUDA")


@torch.library.register_fake("lkda::kda_forward", lib=_library)
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, save, recompute):
    if not save:
        return *empty_results(v, cu_seqlens), *(_nothing(v) for _ in range(4))
    sizes = sizes_of(v, cu_seqlens)
    workspaces = _nothing(v) if recompute else empty_bytes(sizes.workspaces, v.device)
    saved = (workspaces, empty_bytes(sizes.saved, v.device))
    if not normalize:
        return *empty_results(v, cu_seqlens), *saved, _nothing(v), _nothing(v)
    normalized = (x.new_empty(x.shape, dtype=normalized_dtype(x.dtype)) for x in (q, k))
    return *empty_results(v, cu_seqlens), *saved, *normalized


@torch.library.register_fake("lkda::kda_workspaces", lib=_library)
def _(q, k, v, g, beta, cu_seqlens, scale):
    return empty_bytes(sizes_of(v, cu_seqlens).workspaces, v.device)


@torch.library.register_fake("lkda::kda_inter_chunk_bwd", lib=_library)
def _(grad_o, grad_final, v, cu_seqlens, workspaces, saved, wants_initial):
    d_initial = empty_results(v, cu_seqlens)[1] if wants_initial else _nothing(saved)
    return d_initial, empty_bytes(sizes_of(v, cu_seqlens).d_saved, v.device)


@torch.library.register_fake("lkda::kda_intra_chunk_bwd", lib=_library)
def _(grad_o, grad_final, q, k, g, beta, *rest):
    return _gradients_of(grad_o, g, beta)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, normalize, save, recompute = inputs
    if not save:
        raise RuntimeError("lkda::kda_forward needs save=True where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.normalize, ctx.recompute = scale, normalize, recompute
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])


def _gradients(ctx, grad_o, grad_final, *grad_saved):
    q, k, v, g, beta, initial_state, cu_seqlens, workspaces, saved, *normalized = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()  # with retain_graph=False only this function holds them from here on
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    bypass = can_bypass_dispatcher(grad_o)
    inter_chunk_bwd: Callable = launch_inter_chunk_bwd if bypass else torch.ops.lkda.kda_inter_chunk_bwd
    intra_chunk_bwd: Callable = launch_intra_chunk_bwd if bypass else torch.ops.lkda.kda_intra_chunk_bwd
    heads = normalized if ctx.normalize else (q, k)
    if ctx.recompute:
        compute: Callable = launch_workspaces if bypass else torch.ops.lkda.kda_workspaces
        workspaces = compute(*heads, v, g, beta, cu_seqlens, ctx.scale)
    wants_initial = initial_state is not None
    d_initial, d_saved = inter_chunk_bwd(grad_o, grad_final, v, cu_seqlens, workspaces, saved, wants_initial)
    del workspaces  # the gradients are allocated in the memory that this frees
    inputs = (*heads, g, beta, initial_state, cu_seqlens)
    dq, dk, *grads = intra_chunk_bwd(grad_o, grad_final, *inputs, saved, d_saved, ctx.scale)
    if ctx.normalize:
        dq, dk = normalize_heads_backward(dq, dk, q, k)
    return dq, dk, *grads, d_initial if wants_initial else None, *[None] * 5


torch.library.register_autograd("lkda::kda_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients, results=2)


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
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """The chunked kernels, differentiable. Arguments and results are those of `kda_attention`.

    Args:
        normalize: whether to divide each q and k by its L2 norm first.
        recompute: whether the backward computes the workspaces again.
    Raises: ValueError if K and V differ.
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
    save = wants_gradient(*inputs)
    forward: Callable = torch.ops.lkda.kda_forward
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if save else launch_forward
    tensors = (q, k, v, g.float(), beta.float(), initial_state, cu_seqlens)
    o, final_state, *_ = forward(*tensors, scale, normalize, save, recompute)
    return o, final_state
