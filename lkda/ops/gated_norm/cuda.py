"""The gated norm on a GPU: launches of the kernels, as custom ops with fake implementations and autograd.

docs/dev/kernels_layer.md explains the kernels. Only the inputs are saved for the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.column_sums.cuda import column_sums
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take, readable

HERE = Path(__file__).parent

# As in the .cu files.
THREADS = 256
ROWS = {"forward": 4, "backward": 2}  # rows per thread at a time
RESIDENT = 3  # blocks of the backward that a multiprocessor should hold
MAX_BLOCKS = 396  # of the backward, each with a line of partial sums: three per multiprocessor of a GPU with 132


reason_cannot_run = cannot_take(otherwise="torch")


@cache
def norm_kernel(name: str, head_dim: int, dtype: torch.dtype) -> Kernel:
    """`forward` or `backward`."""
    defines: dict[str, str | int | float] = {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype]}
    if name == "forward":
        return Module(HERE / "forward.cu", defines).kernel("gated_norm_forward", "PPPPif")
    module = Module(HERE / "backward.cu", defines | {"RESIDENT": RESIDENT})
    return module.kernel("gated_norm_backward", "PPPPPPPif", shared_bytes=THREADS * 16 // dtype.itemsize * 4)


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    return [norm_kernel(name, head_dim, dtype) for name in ROWS for head_dim in HEAD_DIMS for dtype in ELEMENTS]


def _blocks(name: str, x: Tensor) -> int:
    """The number of blocks, so that each group of rows has one."""
    rows_of_a_block = THREADS * 16 // x.element_size() // x.shape[-1] * ROWS[name]
    return -(-(x.numel() // x.shape[-1]) // rows_of_a_block)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def launch_forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    x, gate, y = readable(x), None if gate is None else readable(gate), _like(x)
    D = x.shape[-1]
    arguments = (x, gate, readable(weight), y, x.numel() // D, eps)
    norm_kernel("forward", D, x.dtype)((_blocks("forward", x), 1, 1), THREADS, *arguments, device=x.device)
    return y


def launch_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty where there is none) and weight."""
    dy, x, gate = readable(dy), readable(x), None if gate is None else readable(gate)
    D = x.shape[-1]
    dx, dgate = _like(x), x.new_empty(0) if gate is None else _like(gate)
    blocks = min(_blocks("backward", x), MAX_BLOCKS)
    partials = torch.empty((blocks, D), dtype=torch.float32, device=x.device)
    arguments = (dy, x, gate, readable(weight), dx, dgate, partials, x.numel() // D, eps)
    norm_kernel("backward", D, x.dtype)((blocks, 1, 1), THREADS, *arguments, device=x.device)
    return dx, dgate, column_sums(partials)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("gated_norm_forward(Tensor x, Tensor? gate, Tensor weight, float eps) -> Tensor")
_library.define(
    "gated_norm_backward(Tensor dy, Tensor x, Tensor? gate, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)"
)
_library.impl("gated_norm_forward", launch_forward, "CUDA")
_library.impl("gated_norm_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::gated_norm_forward", lib=_library)
def _(x, gate, weight, eps):
    return _like(x)


@torch.library.register_fake("lkda::gated_norm_backward", lib=_library)
def _(dy, x, gate, weight, eps):
    return _like(x), x.new_empty(0) if gate is None else _like(gate), _like(weight)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy):
    x, gate, weight = ctx.saved_tensors
    backward: Callable = launch_backward if can_bypass_dispatcher(dy) else torch.ops.lkda.gated_norm_backward
    dx, dgate, dweight = backward(dy, x, gate, weight, ctx.eps)
    return dx, dgate if gate is not None else None, dweight, None


torch.library.register_autograd("lkda::gated_norm_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients)


def gated_norm_cuda(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The kernels, differentiable. Arguments as in `gated_rms_norm`."""
    inputs = (x, gate, weight.float())
    forward: Callable = torch.ops.lkda.gated_norm_forward
    if can_bypass_dispatcher(*inputs):
        save = wants_gradient(*inputs)
        forward = _with_autograd if save else launch_forward
    return forward(*inputs, eps)
