"""The gated norm on a CPU: calls of norm.cpp, as custom ops with fake implementations and autograd.

Only the inputs are saved for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.cpp import NAMES, Library, cpu_only
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher

LIBRARY = Library(Path(__file__).with_name("norm.cpp"))
PARTS = 64  # into which the rows are divided for the gradient of the weight

reason_cannot_run = cpu_only(LIBRARY, otherwise="torch")


def _forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    x, gate, weight = x.contiguous(), None if gate is None else gate.contiguous(), weight.contiguous()
    y, D = x.new_empty(x.shape), x.shape[-1]
    arguments = (x.numel() // D, D, x, gate, weight, eps, y, torch.get_num_threads())
    LIBRARY.call(f"norm_forward_{NAMES[x.dtype]}", *arguments)
    return y


def _backward(dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty where there is none) and weight."""
    dy, x, gate = dy.contiguous(), x.contiguous(), None if gate is None else gate.contiguous()
    weight, D = weight.contiguous(), x.shape[-1]
    dx, dgate, sums = x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape), x.new_empty(PARTS, D)
    arguments = (x.numel() // D, D, PARTS, dy, x, gate, weight, eps, dx, dgate, sums, torch.get_num_threads())
    LIBRARY.call(f"norm_backward_{NAMES[x.dtype]}", *arguments)
    return dx, dgate, sums.sum(0)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("gated_norm_cpu_forward(Tensor x, Tensor? gate, Tensor weight, float eps) -> Tensor")
_library.define(
    "gated_norm_cpu_backward(Tensor dy, Tensor x, Tensor? gate, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)"
)
_library.impl("gated_norm_cpu_forward", _forward, "CPU")
_library.impl("gated_norm_cpu_backward", _backward, "CPU")


@torch.library.register_fake("lkda::gated_norm_cpu_forward", lib=_library)
def _(x, gate, weight, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("lkda::gated_norm_cpu_backward", lib=_library)
def _(dy, x, gate, weight, eps):
    return x.new_empty(x.shape), x.new_empty(0 if gate is None else x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    x, gate, weight = ctx.saved_tensors
    backward: Callable = _backward if can_bypass_dispatcher(dy) else torch.ops.lkda.gated_norm_cpu_backward
    dx, dgate, dweight = backward(dy, x, gate, weight, ctx.eps)
    return dx, dgate if gate is not None else None, dweight, None


torch.library.register_autograd("lkda::gated_norm_cpu_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(_forward, _save, _gradients)


def gated_norm_cpu(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The C++, differentiable. Arguments and result as in `gated_rms_norm`."""
    dtype = compute_dtype(x)
    inputs = (x.to(dtype), None if gate is None else gate.to(dtype), weight.to(dtype))
    forward: Callable = torch.ops.lkda.gated_norm_cpu_forward
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if wants_gradient(*inputs) else _forward
    y: Tensor = forward(*inputs, eps)
    return y.to(x.dtype)
