"""SwiGLU on a GPU, and its backward: one launch each."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import ELEMENTS, readable, readable_rows

# A row of most models then fills nearly all threads of its blocks.
THREADS = 64
BACKWARD_THREADS = 256


def cannot_run(device: torch.device, hidden: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if device.type == "cuda" and dtype not in ELEMENTS:
        return f"the kernel takes bfloat16, float16 and float32, got {dtype}; use backend='torch'."
    if device.type == "cuda" and hidden % (multiple := _at_once(dtype)):
        return f"the kernel takes halves of a multiple of {multiple} in {dtype}, got {hidden}; use backend='torch'."
    return reason_cannot_run(device)


# What torch.compiler.assume_constant_result does; but that imports torch._dynamo, which takes seconds.
cannot_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _at_once(dtype: torch.dtype) -> int:
    """The elements that a thread reads at once, in 16 bytes."""
    return 16 // dtype.itemsize


@cache
def swiglu_kernel(dtype: torch.dtype) -> Kernel:
    module = Module(Path(__file__).with_name("swiglu.cu"), {"ELEMENT": ELEMENTS[dtype], "THREADS": THREADS})
    return module.kernel("swiglu", "PPii", overlapping=True)


@cache
def swiglu_backward_kernel(dtype: torch.dtype) -> Kernel:
    defines: dict[str, str | int | float] = {"ELEMENT": ELEMENTS[dtype], "THREADS": BACKWARD_THREADS}
    return Module(Path(__file__).with_name("backward.cu"), defines).kernel("swiglu_backward", "PPPPiii")


def kernels(arch: str) -> list[Kernel]:
    """Every variant: each dtype."""
    return [kernel(dtype) for kernel in (swiglu_kernel, swiglu_backward_kernel) for dtype in ELEMENTS]


def swiglu_cuda(x: Tensor) -> Tensor:
    """The kernel. The argument is that of `swiglu`, already checked."""
    B, hidden = x.shape[0], x.shape[1] // 2
    x, y = readable_rows(x), x.new_empty(B, hidden)
    blocks = -(-hidden // (_at_once(x.dtype) * THREADS))
    swiglu_kernel(x.dtype)((B * blocks, 1, 1), THREADS, x, y, hidden, x.stride(0), device=x.device)
    return y


def launch_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x [B, 2 * hidden], and the result of the forward again. dy [B, hidden] is that of the result."""
    B, hidden = dy.shape
    dy, x = readable(dy), readable_rows(x)
    dx, y = x.new_empty(B, 2 * hidden), torch.empty_like(dy)
    groups = B * hidden // _at_once(x.dtype)
    if groups:
        arguments = (dy, x, dx, y, groups, hidden, x.stride(0))
        blocks = -(-groups // BACKWARD_THREADS)
        swiglu_backward_kernel(x.dtype)((blocks, 1, 1), BACKWARD_THREADS, *arguments, device=x.device)
    return dx, y
