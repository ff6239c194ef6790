"""A KDA layer between its projections on a GPU, as one differentiable function that saves little for its backward.

    q, k, v = SiLU(conv(x)), q and k normalised         g, beta = gate(logits), logits = W_f latent
    y = RMSNorm(o) * sigmoid(W_g latent')               o = the core of KDA on q, k, v, g and beta

The kernels are those of `short_conv`, `gate`, `core` and `gated_norm`. As operators of their own each saves its inputs
for the backward, and the core saves its workspaces and states too. Here the backward runs the kernels of the forward
again, which gives the same numbers bit for bit, and then those of the backward. `SAVED_FOR_BACKWARD` lists what can be
saved, so that fewer kernels run again. docs/dev/kernels_layer.md has the bytes and the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops.gated_norm import cuda as gated_norm
from lkda.ops.kda.cuda import core
from lkda.ops.kda.cuda import gate as gates
from lkda.ops.kda.reference.gate import KDAGate
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.short_conv import cuda as short_conv

# What is saved between forward and backward: the inputs of the function; the workspaces of the core too; or the
# workspaces, the states and the output of the core, so that the backward computes only element-wise results and
# products of low rank again.
SAVED_FOR_BACKWARD = ("inputs", "workspaces", "core")
_NO_BACKWARD = "nothing"  # in their place, where no backward follows
_NORMALIZED = 0b011  # q and k
_RESULTS = 5  # y, the final state and three last inputs; what is saved for backward follows
# latent, weight, beta_logits, A_log and bias
_Decay = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]


class _Recomputed(NamedTuple):
    """What the forward computes on its way to the core, and the inputs after the convolutions (float32)."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor | None
    g: Tensor
    beta: Tensor
    lasts: tuple[Tensor, ...]


def runs(x: Tensor, filters: Sequence[Tensor], head_dim: int, backend: str) -> bool:
    """Whether `kda_layer_cuda` can take these tensors and `backend`, of `kda_attention`, allows it."""
    fits = filters[0].shape[-1] <= short_conv.MAX_TAPS
    return backend in ("auto", "cuda") and fits and core.reason_cannot_run(x.device, head_dim, x.dtype) is None


def _heads(y: Tensor, head_dim: int) -> Tensor:
    return y.unflatten(-1, (-1, head_dim))


def _logits(latent: Tensor | None, weight: Tensor | None, beta_logits: Tensor, head_dim: int) -> Tensor | None:
    """[B, T, H, D] or, where the weight has a row per head, [B, T, H]."""
    if latent is None or weight is None:
        return None
    logits = F.linear(latent, weight)
    return logits if logits.shape == beta_logits.shape else _heads(logits, head_dim)


def _before_core(
    x: Tensor,
    filters: tuple[Tensor, Tensor, Tensor],
    decay: _Decay,
    cu_seqlens: Tensor | None,
    head_dim: int,
    options: tuple[bool, float, float],
) -> _Recomputed:
    latent, weight, beta_logits, a_log, bias = decay
    none = (None, None, None)
    found = short_conv.launch_forward(x, None, None, *filters, *none, cu_seqlens, _NORMALIZED, head_dim)
    q, k, v = (_heads(y, head_dim) for y in found[:3])
    logits = _logits(latent, weight, beta_logits, head_dim)
    g, beta = gates.launch_forward(logits, beta_logits, a_log, bias, head_dim, *options)
    return _Recomputed(q, k, v, logits, g, beta, found[3:])


def _forward(
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    latent: Tensor | None,
    weight: Tensor | None,
    beta_logits: Tensor,
    a_log: Tensor | None,
    bias: Tensor | None,
    out_latent: Tensor | None,
    out_weight: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor | None,
    head_dim: int,
    bounded: bool,
    lower_bound: float,
    strength: float,
    scale: float,
    eps: float,
    save_for_backward: str,
) -> tuple[Tensor, ...]:
    """y [B, T, H, D], the final state, the last inputs of the three convolutions, and for `_backward` the workspaces,
    what else the core saves, and o. Of these three, what is not saved is empty."""
    decay, options = (latent, weight, beta_logits, a_log, bias), (bounded, lower_bound, strength)
    here = _before_core(x, (w0, w1, w2), decay, cu_seqlens, head_dim, options)
    inputs = (here.q, here.k, here.v, here.g, here.beta)
    saved_workspaces = core.launch_workspaces(*inputs, cu_seqlens, scale) if save_for_backward == "workspaces" else None
    o, final_state, workspaces, saved, _, _ = core.launch_forward(
        *(*inputs, None, cu_seqlens, scale),
        normalize=False,
        save=save_for_backward == "core",
        workspaces=saved_workspaces,
        recomputed=save_for_backward == "inputs",
    )
    y = gated_norm.launch_forward(o, _output_gate(out_latent, out_weight, head_dim), norm_weight, eps)
    more = (
        saved_workspaces if save_for_backward == "workspaces" else workspaces,
        saved,
        o if save_for_backward == "core" else None,
    )
    return y, final_state, *here.lasts, *(x.new_empty(0) if tensor is None else tensor for tensor in more)


def _output_gate(latent: Tensor | None, weight: Tensor | None, head_dim: int) -> Tensor | None:
    return None if latent is None or weight is None else _heads(F.linear(latent, weight), head_dim)


def _backward(
    dy: Tensor,
    d_final: Tensor | None,
    e0: Tensor | None,
    e1: Tensor | None,
    e2: Tensor | None,
    workspaces: Tensor,
    saved: Tensor,
    o: Tensor,
    x: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    latent: Tensor | None,
    weight: Tensor | None,
    beta_logits: Tensor,
    a_log: Tensor | None,
    bias: Tensor | None,
    out_latent: Tensor | None,
    out_weight: Tensor | None,
    norm_weight: Tensor,
    cu_seqlens: Tensor | None,
    head_dim: int,
    bounded: bool,
    lower_bound: float,
    strength: float,
    scale: float,
    eps: float,
    save_for_backward: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, of the filters as one tensor [3, C, 1, width], of latent, weight and beta_logits, of bias and
    A_log as one row, and of out_latent, out_weight and norm_weight. What does not exist is empty.

    Each tensor is deleted after its last use, so that the next ones are allocated in its memory.
    """
    decay, options = (latent, weight, beta_logits, a_log, bias), (bounded, lower_bound, strength)
    q, k, v, logits, g, beta, _ = _before_core(x, (w0, w1, w2), decay, cu_seqlens, head_dim, options)
    if save_for_backward != "core":
        saved_workspaces = workspaces if save_for_backward == "workspaces" else None
        o, _, found, more, _, _ = core.launch_forward(
            *(q, k, v, g, beta), None, cu_seqlens, scale, normalize=False, save=True, workspaces=saved_workspaces
        )
        assert found is not None
        assert more is not None
        workspaces, saved = found, more
        del saved_workspaces, found, more
    output_gate = _output_gate(out_latent, out_weight, head_dim)
    do, d_output_gate, d_norm_weight = gated_norm.launch_backward(dy, o, output_gate, norm_weight, eps)
    del o, output_gate
    d_out_latent, d_out_weight = _linear_backward(d_output_gate, out_latent, out_weight)
    del d_output_gate
    _, d_saved = core.launch_inter_chunk_bwd(do, d_final, v, cu_seqlens, workspaces, saved, wants_initial=False)
    del v, workspaces
    dq, dk, dv, dg, dbeta = core.launch_intra_chunk_bwd(
        do, d_final, q, k, g, beta, None, cu_seqlens, saved, d_saved, scale
    )
    del do, q, k, g, beta, saved, d_saved
    dlogits, dbeta_logits, sums = gates.launch_backward(dg, dbeta, logits, beta_logits, a_log, bias, *options)
    del dg, dbeta, logits
    dlatent, dweight = _linear_backward(dlogits, latent, weight)
    del dlogits
    d0, d1, d2 = (d.flatten(2) for d in (dq, dk, dv))
    none = (None, None, None)
    dx, *_, dfilters = short_conv.launch_backward(
        *(d0, d1, d2, e0, e1, e2), *(x, None, None), *(w0, w1, w2), *none, cu_seqlens, _NORMALIZED, head_dim
    )
    return dx, dfilters, dlatent, dweight, dbeta_logits, sums, d_out_latent, d_out_weight, d_norm_weight


def _linear_backward(dy: Tensor, x: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in y = x weight^T, of which dy may have its last axis split into heads."""
    if x is None or weight is None:
        return dy.new_empty(0), dy.new_empty(0)
    dy = dy.reshape(-1, len(weight))
    return (dy @ weight).view(x.shape), dy.mT @ x.reshape(-1, x.shape[-1])


_INPUTS = (
    "Tensor x, Tensor w0, Tensor w1, Tensor w2, Tensor? latent, Tensor? weight, Tensor beta_logits, Tensor? a_log, "
    "Tensor? bias, Tensor? out_latent, Tensor? out_weight, Tensor norm_weight, Tensor? cu_seqlens, int head_dim, "
    "bool bounded, float lower_bound, float strength, float scale, float eps, str save_for_backward"
)
_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(f"kda_layer({_INPUTS}) -> ({', '.join(['Tensor'] * 8)})")
_library.define(
    f"kda_layer_backward(Tensor dy, Tensor? d_final, Tensor? e0, Tensor? e1, Tensor? e2, "
    f"Tensor workspaces, Tensor saved, Tensor o, {_INPUTS})"
    f" -> ({', '.join(['Tensor'] * 9)})"
)
_library.impl("kda_layer", _forward, "CUDA")
_library.impl("kda_layer_backward", _backward, "CUDA")


@torch.library.register_fake("lkda::kda_layer", lib=_library)
def _(
    x, w0, w1, w2, latent, weight, beta_logits, a_log, bias, out_latent, out_weight, norm_weight, cu_seqlens, *options
):
    head_dim, *_, save_for_backward = options
    ys, lasts = short_conv.forward_outputs(x.chunk(3, -1)[0], w0, 3, cu_seqlens)
    y = _heads(ys[0], head_dim)
    sizes, for_backward = core.sizes_of(y, cu_seqlens), [x.new_empty(0) for _ in range(3)]
    if save_for_backward in ("workspaces", "core"):
        for_backward[0] = core.empty_bytes(sizes.workspaces, x.device)
    if save_for_backward == "core":
        for_backward[1:] = core.empty_bytes(sizes.saved, x.device), torch.empty_like(y)
    return y, core.empty_results(y, cu_seqlens)[1], *lasts, *for_backward


@torch.library.register_fake("lkda::kda_layer_backward", lib=_library)
def _(dy, d_final, e0, e1, e2, workspaces, saved, o, *inputs):
    x, w0, _, _, latent, weight, beta_logits, _, bias, out_latent, out_weight, norm_weight, *_ = inputs

    def like(given):
        return dy.new_empty(0) if given is None else torch.empty(given.shape, dtype=given.dtype, device=x.device)

    sums = 0 if bias is None else bias.numel() + beta_logits.shape[-1]
    return (
        like(x),
        torch.empty((3, *w0.shape), dtype=torch.float32, device=x.device),
        *(like(latent), like(weight), like(beta_logits)),
        torch.empty(sums, dtype=torch.float32, device=x.device),
        *(like(out_latent), like(out_weight), like(norm_weight)),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, head_dim, bounded, lower_bound, strength, scale, eps, save_for_backward = inputs
    if save_for_backward == _NO_BACKWARD:
        raise RuntimeError("lkda::kda_layer needs one of SAVED_FOR_BACKWARD where a gradient is wanted")
    ctx.options = (head_dim, bounded, lower_bound, strength, scale, eps, save_for_backward)
    ctx.save_for_backward(*output[_RESULTS:], *tensors)


def _gradients(ctx, dy, d_final, *more):
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    *_, x, _, _, _, latent, _, _, a_log, bias, out_latent, _, _, _ = saved
    if dy is None:
        head_dim = ctx.options[0]
        dy = x.new_zeros(*x.shape[:2], x.shape[2] // 3 // head_dim, head_dim)
    backward: Callable = _backward if can_bypass_dispatcher(dy) else torch.ops.lkda.kda_layer_backward
    dx, dfilters, dlatent, dweight, dbeta_logits, sums, *d_output, d_norm_weight = backward(
        dy, d_final, *more[:3], *saved, *ctx.options
    )
    d_decay: tuple[Tensor | None, ...] = (None, None)
    if bias is not None and a_log is not None:
        d_decay = (sums[bias.numel() :].view(a_log.shape), sums[: bias.numel()].view(bias.shape))
    if latent is None:
        dlatent = dweight = None
    d_gate = d_output if out_latent is not None else (None, None)
    return dx, *dfilters.unbind(0), dlatent, dweight, dbeta_logits, *d_decay, *d_gate, d_norm_weight, *[None] * 8


torch.library.register_autograd("lkda::kda_layer", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(_forward, _save, _gradients, results=_RESULTS)


def kda_layer_cuda(
    x: Tensor,
    filters: Sequence[Tensor],
    latent: Tensor | None,
    weight: Tensor | None,
    beta_logits: Tensor,
    gate: KDAGate,
    out_latent: Tensor | None,
    out_weight: Tensor | None,
    norm_weight: Tensor,
    *,
    head_dim: int,
    eps: float = 1e-5,
    cu_seqlens: Tensor | None = None,
    save_for_backward: str = "inputs",
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """From the projections of a KDA layer to the input of its output projection; differentiable.

    Args:
        x: [B, T, 3 * H * D], the projections to q, k and v side by side.
        filters: [H * D, 1, width] for each of q, k and v.
        latent, weight: [B, T, R] and [H * D or H, R]: their product has the logits of the decay, per channel or per
            head. None for no decay.
        beta_logits: [B, T, H].
        gate: what turns the logits into g and beta.
        out_latent, out_weight: [B, T, R] and [H * D, R], as above for the gate of the output. None for no gate.
        norm_weight: [D].
        head_dim: D.
        eps: of the norm.
        cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1); they may be empty.
        save_for_backward: one of SAVED_FOR_BACKWARD.
    Returns: y [B, T, H, D] in x's dtype, the final state [B or N, H, D, D] in float32, and the inputs of the three
        convolutions at the end of each sequence, [B or N, width - 1, H * D] in the filters' dtype.
    """
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    dtype = x.dtype
    latent, weight, out_latent, out_weight = (
        None if y is None else y.to(dtype) for y in (latent, weight, out_latent, out_weight)
    )
    a_log, bias = (None if p is None else p.float() for p in (gate.A_log, gate.dt_bias))
    tensors = (
        *(x, *(w.float() for w in filters), latent, weight, beta_logits.to(dtype), a_log, bias),
        *(out_latent, out_weight, norm_weight.float()),
    )
    wanted = wants_gradient(*tensors)
    forward: Callable = torch.ops.lkda.kda_layer
    if can_bypass_dispatcher(*tensors):
        forward = _with_autograd if wanted else _forward
    options = (head_dim, gate.bounded, gate.lower_bound, gate.strength, head_dim**-0.5, eps)
    y, final_state, *more = forward(*tensors, cu_seqlens, *options, save_for_backward if wanted else _NO_BACKWARD)
    return y, final_state, tuple(last.to(w.dtype) for last, w in zip(more, filters))
