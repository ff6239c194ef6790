"""The decays of simplified linear attention on a GPU: one launch, and two for the gradients, as custom ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.column_sums.cuda import column_sums
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.jit import Kernel, Module, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import ELEMENTS, readable

# As in decay.cu. A block of the backward has TIMES times as many tokens as its threads have heads for.
THREADS, TIMES = 256, 4


def cannot_run(device: torch.device, heads: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, or None if they can."""
    if device.type == "cuda" and dtype not in ELEMENTS:
        return f"the kernel takes bfloat16, float16 and float32, got {dtype}; use backend='torch'."
    if device.type == "cuda" and not 0 < heads <= THREADS:
        return f"the kernel takes up to {THREADS} heads, got {heads}; use backend='torch'."
    return reason_cannot_run(device)


# What torch.compiler.assume_constant_result does; but that imports torch._dynamo, which takes seconds.
cannot_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def decay_kernel(entry: str, dtype: torch.dtype) -> Kernel:
    """`simplified_decay` or `simplified_decay_backward`."""
    module = Module(Path(__file__).with_name("decay.cu"), {"ELEMENT": ELEMENTS[dtype]})
    if entry == "simplified_decay":
        return module.kernel(entry, "PPPiiq")
    return module.kernel(entry, "PPPPii", shared_bytes=4 * THREADS)


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each dtype."""
    entries = ("simplified_decay", "simplified_decay_backward")
    return [decay_kernel(entry, dtype) for entry in entries for dtype in ELEMENTS]


def launch_forward(logits: Tensor, bias: Tensor) -> Tensor:
    """logits [N, H], whose rows may lie apart, and bias [H] in float32 -> the decays [N, H] in float32."""
    tokens, heads = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    y = torch.empty(tokens, heads, dtype=torch.float32, device=logits.device)
    arguments = (logits, readable(bias), y, tokens, heads, logits.stride(0))
    blocks = -(-tokens * heads // THREADS)
    decay_kernel("simplified_decay", logits.dtype)((blocks, 1, 1), THREADS, *arguments, device=y.device)
    return y


def launch_backward(dy: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of the logits, of `dtype`, and of the bias."""
    tokens, heads = y.shape
    dx = torch.empty(tokens, heads, dtype=dtype, device=y.device)
    blocks = -(-tokens // (THREADS // heads * TIMES))
    partials = torch.empty(blocks, heads, dtype=torch.float32, device=y.device)
    arguments = (readable(dy), y, dx, partials, tokens, heads)
    decay_kernel("simplified_decay_backward", dtype)((blocks, 1, 1), THREADS, *arguments, device=y.device)
    return dx, column_sums(partials)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define("simplified_decay(Tensor logits, Tensor bias) -> Tensor")
_library.define("simplified_decay_backward(Tensor dy, Tensor y, ScalarType dtype) -> (Tensor, Tensor)")
_library.impl("simplified_decay", launch_forward, "CUDA")
_library.impl("simplified_decay_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::simplified_decay", lib=_library)
def _(logits, bias):
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device)


@torch.library.register_fake("lkda::simplified_decay_backward", lib=_library)
def _(dy, y, dtype):
    dx = torch.empty(y.shape, dtype=dtype, device=y.device)
    return dx, torch.empty(y.shape[1], dtype=torch.float32, device=y.device)


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output)


def _gradients(ctx, dy):
    (y,) = ctx.saved_tensors
    backward: Callable = launch_backward if can_bypass_dispatcher(dy) else torch.ops.lkda.simplified_decay_backward
    return backward(dy, y, ctx.dtype)


torch.library.register_autograd("lkda::simplified_decay", _gradients, setup_context=_save, lib=_library)
_with_autograd = without_dispatcher(launch_forward, _save, _gradients)


def simplified_decay_cuda(logits: Tensor, bias: Tensor) -> Tensor:
    """The kernels, differentiable. Arguments as in `simplified_decay`."""
    inputs = (logits.flatten(0, -2), bias.float())
    forward: Callable = torch.ops.lkda.simplified_decay
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if wants_gradient(*inputs) else launch_forward
    return forward(*inputs).unflatten(0, logits.shape[:-1])
