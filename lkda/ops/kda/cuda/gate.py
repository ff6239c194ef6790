"""The gates of a KDA layer on a GPU: from logits to g and beta in one launch, as custom ops with autograd.

docs/dev/kernels_layer.md explains the kernels. Only the logits are saved for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.column_sums.cuda import column_sums
from lkda.ops.kda.reference.gate import KDAGate
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, readable

HERE = Path(__file__).parent

# As in gate.cu.
WARPS = 8
THREADS = 32 * WARPS
RUN = {"kda_gate": 2, "kda_gate_backward": 16}  # tokens per warp


def _channels_of_a_thread(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


@cache
def gate_kernel(entry: str, head_dim: int, dtype: torch.dtype, per_head: bool) -> Kernel:
    """`kda_gate` or `kda_gate_backward`."""
    module = Module(HERE / "gate.cu", {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype], "PER_HEAD": int(per_head)})
    if entry == "kda_gate":
        return module.kernel(entry, "PPPPPPiiiiiff")
    return module.kernel(entry, "PPPPPPPPPiiiiiff", shared_bytes=4 * THREADS * (_channels_of_a_thread(dtype) + 1))


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    return [
        gate_kernel(entry, head_dim, dtype, per_head)
        for entry in RUN
        for head_dim in HEAD_DIMS
        for dtype in ELEMENTS
        for per_head in (False, True)
    ]


def _given(*xs: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else readable(x) for x in xs)


def _lines(entry: str, tokens: int) -> int:
    """The number of blocks along the tokens."""
    return -(-tokens // (WARPS * RUN[entry]))


def _launch(entry: str, strengths: Tensor, per_head: bool, gated: bool, head_dim: int, *arguments, options) -> None:
    """Launches a kernel. `options` are bounded, lower_bound and strength."""
    tokens, heads = strengths.numel() // strengths.shape[-1], strengths.shape[-1]
    channels = heads * head_dim
    columns = -(-channels // (32 * _channels_of_a_thread(strengths.dtype)))
    gate_blocks = _lines(entry, tokens) * columns if gated else 0
    grid = (gate_blocks + -(-tokens * heads // THREADS), 1, 1)
    kernel = gate_kernel(entry, head_dim, strengths.dtype, per_head)
    kernel(grid, THREADS, *arguments, gate_blocks, RUN[entry], tokens, channels, *options, device=strengths.device)


def launch_forward(
    logits: Tensor | None,
    strengths: Tensor,
    a_log: Tensor | None,
    bias: Tensor | None,
    head_dim: int,
    bounded: bool,
    lower_bound: float,
    strength: float,
) -> tuple[Tensor, Tensor]:
    g, beta = forward_outputs(strengths, head_dim)
    strengths = strengths.contiguous()
    if logits is None:
        g.zero_()
    inputs = _given(logits, strengths, a_log, bias)
    per_head = logits is not None and logits.dim() == 3
    options = (int(bounded), lower_bound, strength)
    _launch("kda_gate", strengths, per_head, logits is not None, head_dim, *inputs, g, beta, options=options)
    return g, beta


def forward_outputs(strengths: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Uninitialised g [B, T, H, K] and beta [B, T, H], float32."""
    return (
        torch.empty((*strengths.shape, head_dim), dtype=torch.float32, device=strengths.device),
        torch.empty(strengths.shape, dtype=torch.float32, device=strengths.device),
    )


def launch_backward(
    dg: Tensor,
    dbeta: Tensor,
    logits: Tensor | None,
    strengths: Tensor,
    a_log: Tensor | None,
    bias: Tensor | None,
    bounded: bool,
    lower_bound: float,
    strength: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits and strengths, and those of bias and A_log in one row [biases + heads].

    The gradient of what was not given is an empty tensor.
    """
    dlogits, dstrengths = _like(logits, strengths), torch.empty_like(strengths, memory_format=torch.contiguous_format)
    strengths = strengths.contiguous()
    tokens, heads = strengths.numel() // strengths.shape[-1], strengths.shape[-1]
    shape = (0,) if bias is None else (_lines("kda_gate_backward", tokens), bias.numel() + heads)
    partials = torch.empty(shape, dtype=torch.float32, device=dg.device)
    inputs = _given(logits, strengths, a_log, bias)
    arguments = (*inputs, readable(dg), dbeta.contiguous(), dlogits, dstrengths, partials)
    per_head, options = logits is not None and logits.dim() == 3, (int(bounded), lower_bound, strength)
    entry = "kda_gate_backward"
    _launch(entry, strengths, per_head, logits is not None, dg.shape[-1], *arguments, options=options)
    return dlogits, dstrengths, partials if logits is None else column_sums(partials)


def _like(x: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


_INPUTS = "Tensor? logits, Tensor strengths, Tensor? a_log, Tensor? bias, "
_OPTIONS = "bool bounded, float lower_bound, float strength"
_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(f"kda_gate({_INPUTS}int head_dim, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(f"kda_gate_backward(Tensor dg, Tensor dbeta, {_INPUTS}{_OPTIONS}) -> (Tensor, Tensor, Tensor)")
_library.impl("kda_gate", launch_forward, "CUDA")
_library.impl("kda_gate_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::kda_gate", lib=_library)
def _(logits, strengths, a_log, bias, head_dim, bounded, lower_bound, strength):
    return forward_outputs(strengths, head_dim)


@torch.library.register_fake("lkda::kda_gate_backward", lib=_library)
def _(dg, dbeta, logits, strengths, a_log, bias, bounded, lower_bound, strength):
    size = 0 if logits is None else bias.numel() + strengths.shape[-1]
    dstrengths = torch.empty_like(strengths, memory_format=torch.contiguous_format)
    return _like(logits, strengths), dstrengths, torch.empty(size, dtype=torch.float32, device=dg.device)


def _save(ctx, inputs, output):
    *tensors, _, ctx.bounded, ctx.lower_bound, ctx.strength = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dg, dbeta):
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    logits, _, a_log, bias = saved
    backward: Callable = launch_backward if can_bypass_dispatcher(dg, dbeta) else torch.ops.lkda.kda_gate_backward
    options = (ctx.bounded, ctx.lower_bound, ctx.strength)
    dlogits, dstrengths, sums = backward(dg, dbeta, *saved, *options)
    if logits is None:
        return None, dstrengths, *[None] * 6
    dbias, da_log = sums[: bias.numel()].view(bias.shape), sums[bias.numel() :].view(a_log.shape)
    return dlogits, dstrengths, da_log, dbias, *[None] * 4


torch.library.register_autograd("lkda::kda_gate", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients)


def kda_gate_cuda(
    gate_logits: Tensor | None, beta_logits: Tensor, gate: KDAGate, *, head_dim: int
) -> tuple[Tensor, Tensor]:
    """g [B, T, H, K] and beta [B, T, H] in float32, differentiable.

    Args:
        gate_logits: [B, T, H, K], [B, T, H] for one decay per head, or None for no decay.
        beta_logits: [B, T, H].
        head_dim: K.
    """
    parameters = (None if x is None else x.float() for x in (gate.A_log, gate.dt_bias))
    inputs = (gate_logits, beta_logits, *parameters)
    forward: Callable = torch.ops.lkda.kda_gate
    if can_bypass_dispatcher(*inputs):
        save = wants_gradient(*inputs)
        forward = _with_autograd if save else launch_forward
    g, beta = forward(*inputs, head_dim, gate.bounded, gate.lower_bound, gate.strength)
    return g if gate_logits is not None else g.detach(), beta
