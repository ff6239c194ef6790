"""SwiGLU and the product after it, with gradients: the last part of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.swiglu.cuda import cannot_run, launch_backward, swiglu_cuda
from lkda.ops.swiglu.reference import swiglu_torch


def _launch_forward(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(swiglu_cuda(x), weight)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("swiglu_linear(Tensor x, Tensor weight) -> Tensor")
_library.define("swiglu_backward(Tensor dy, Tensor x) -> (Tensor, Tensor)")
_library.impl("swiglu_linear", _launch_forward, "CUDA")
_library.impl("swiglu_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::swiglu_linear", lib=_library)
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("lkda::swiglu_backward", lib=_library)
def _(dy, x):
    return x.new_empty(x.shape), torch.empty_like(dy)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_output):
    """The result of SwiGLU is not kept for the backward: one launch computes it again with the gradients of x."""
    x, weight = ctx.saved_tensors
    backward: Callable = launch_backward if can_bypass_dispatcher(d_output) else torch.ops.lkda.swiglu_backward
    dx, y = backward((d_output @ weight).contiguous(), x)
    return dx, d_output.t() @ y if ctx.needs_input_grad[1] else None


torch.library.register_autograd("lkda::swiglu_linear", _gradients, setup_context=_save, lib=_library)
_with_autograd = without_dispatcher(_launch_forward, _save, _gradients)


def _swiglu_linear_cuda(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    forward: Callable = torch.ops.lkda.swiglu_linear
    if can_bypass_dispatcher(rows, weight):
        forward = _with_autograd if wants_gradient(rows, weight) else _launch_forward
    return forward(rows, weight).unflatten(0, x.shape[:-1])


def _swiglu_linear_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(swiglu_torch(x), weight)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(_swiglu_linear_cuda, cannot_run),
    "torch": Backend(_swiglu_linear_torch),
}


def swiglu_linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """The product of SiLU(gate) * up with a matrix, where x = [gate, up]. Its backward keeps x and the weight.

    In half precision PyTorch rounds SiLU(gate) and the product of both, the kernel their product alone.

    Args:
        x: [..., 2 * hidden].
        weight: [outputs, hidden], of the dtype of x.
        backend: auto | cuda | torch.
    Returns: [..., outputs].
    Raises: ValueError if a shape or dtype does not fit; the message names the tensor.
    """
    fn = "swiglu_linear"
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != 2 * weight.shape[1]:
        raise InputError(
            f"{fn}: x must be [..., 2 * hidden] and weight [outputs, hidden], got {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    if x.dtype != weight.dtype:
        raise InputError(f"{fn}: x and weight must have one dtype, got {x.dtype} and {weight.dtype}.")
    word = choose(fn, BACKENDS, backend, device=x.device, head_dim=weight.shape[1], dtype=x.dtype)
    y: Tensor = BACKENDS[word].run(x, weight)
    return y
