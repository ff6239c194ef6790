"""The residual sum with its norm on a GPU: launches of the kernels, as custom ops with fakes and autograd.

The backward keeps 1 / rms of each row, and s; or x and y, if y is narrower than s. The norm of the sum before keeps x
anyway, so that s then takes no memory between forward and backward.
"""

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

HERE = Path(__file__).parent
MULTIPLE, LONGEST = 8, 8192  # of the rows
MAX_BLOCKS = 528  # of the backward, each with a line of partial sums: four per multiprocessor of a GPU with 132


def cannot_run(device: torch.device, width: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, or None if they can."""
    if device.type == "cuda" and dtype not in ELEMENTS:
        return f"the kernel takes bfloat16, float16 and float32, got {dtype}; use backend='torch'."
    if device.type == "cuda" and not (0 < width <= LONGEST and width % MULTIPLE == 0):
        return f"the kernel takes rows of a multiple of {MULTIPLE} up to {LONGEST}, got {width}; use backend='torch'."
    return reason_cannot_run(device)


# What torch.compiler.assume_constant_result does; but that imports torch._dynamo, which takes seconds.
cannot_run._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _warps(width: int) -> int:
    """The warps that share a row, as in residual_row.cuh."""
    return next(warps for warps in (1, 2, 4, 8, 16) if width <= 512 * warps)


def _threads(width: int) -> int:
    return max(128, 32 * _warps(width))


def _rows_of_a_block(width: int) -> int:
    return _threads(width) // (32 * _warps(width))


@cache
def norm_kernel(name: str, width: int, stream: torch.dtype, added: torch.dtype, result: torch.dtype) -> Kernel:
    """`forward` or `backward`, for rows of `width` numbers and the data types of x, y and n."""
    types = {"STREAM": ELEMENTS[stream], "ADDED": ELEMENTS[added], "RESULT": ELEMENTS[result]}
    module = Module(HERE / f"{name}.cu", {"WIDTH": width, **types})
    warps = _threads(width) // 32
    if name == "forward":
        return module.kernel("residual_norm_forward", "PPPPPPif", shared_bytes=4 * warps)
    shared = 4 * max(warps, _rows_of_a_block(width) * width)
    return module.kernel("residual_norm_backward", "PPPPPPPPPi", shared_bytes=shared)


def kernels(arch: str) -> list[Kernel]:
    """Those of usual widths, with 1 to 16 warps for a row, in mixed precision, float32 and half precision."""
    bf16, fp32 = torch.bfloat16, torch.float32
    types, widths = ((fp32, bf16, bf16), (fp32, fp32, fp32), (bf16, bf16, bf16)), (512, 1024, 2048, 8192)
    return [norm_kernel(name, d, *chosen) for name in ("forward", "backward") for d in widths for chosen in types]


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _blocks(rows: int, width: int) -> int:
    return -(-rows // _rows_of_a_block(width))


def launch_forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """s (x itself if y is None), n, and 1 / rms of each row of s [rows] in float32."""
    s = None if y is None else _like(x)
    return x if s is None else s, *_launch_forward(x, y, weight, eps, dtype, s)


def _launch_new(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `launch_forward`, but s is always a new tensor: a custom op may not return its input."""
    s = _like(x)
    return s, *_launch_forward(x, y, weight, eps, dtype, s)


def _launch_forward(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, s: Tensor | None
) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    rows = x.numel() // d
    n, inverse = _like(x, dtype), x.new_empty(rows, dtype=torch.float32)
    kernel = norm_kernel("forward", d, x.dtype, dtype if y is None else y.dtype, dtype)
    tensors = (readable(x), None if y is None else readable(y), readable(weight), s, n, inverse)
    kernel((_blocks(rows, d), 1, 1), _threads(d), *tensors, rows, eps, device=x.device)
    return n, inverse


def launch_backward(
    ds: Tensor | None, dn: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, inverse: Tensor, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of y (empty if y is None) and of weight (empty if it is not `weighted`); s is x + y."""
    d, rows = x.shape[-1], inverse.numel()
    dn, x = readable(dn), readable(x)
    ds, y = (None if tensor is None else readable(tensor) for tensor in (ds, y))
    dx, dy = _like(x), x.new_empty(0) if y is None else _like(y)
    blocks = min(_blocks(rows, d), MAX_BLOCKS)
    partials = x.new_empty(blocks, d, dtype=torch.float32) if weighted else None
    kernel = norm_kernel("backward", d, x.dtype, dn.dtype if y is None else y.dtype, dn.dtype)
    arguments = (ds, dn, x, y, readable(weight), inverse, dx, dy, partials, rows)
    kernel((blocks, 1, 1), _threads(d), *arguments, device=x.device)
    return dx, dy, x.new_empty(0, dtype=torch.float32) if partials is None else column_sums(partials)


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "residual_norm(Tensor x, Tensor? y, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "residual_norm_backward(Tensor? ds, Tensor dn, Tensor x, Tensor? y, Tensor weight, Tensor inverse, bool weighted)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("residual_norm", _launch_new, "CUDA")
_library.impl("residual_norm_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::residual_norm", lib=_library)
def _(x, y, weight, eps, dtype):
    return _like(x), _like(x, dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.register_fake("lkda::residual_norm_backward", lib=_library)
def _(ds, dn, x, y, weight, inverse, weighted):
    dweight = x.new_empty(x.shape[-1] if weighted else 0, dtype=torch.float32)
    return _like(x), x.new_empty(0) if y is None else _like(y), dweight


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    (x, y, weight, _, ctx.dtype), (s, _, inverse) = inputs, output
    ctx.adds, narrow = y is not None, y is not None and y.dtype.itemsize < x.dtype.itemsize
    ctx.save_for_backward(*((x, y) if narrow else (s, None)), weight, inverse)


def _gradients(ctx, ds, dn, _):
    x, y, weight, inverse = ctx.saved_tensors
    if dn is None:
        dn = torch.zeros(x.shape, dtype=ctx.dtype, device=x.device)
    backward: Callable = launch_backward if can_bypass_dispatcher(ds, dn) else torch.ops.lkda.residual_norm_backward
    weighted = ctx.needs_input_grad[2]
    dx, dy, dweight = backward(ds, dn, x, y, weight, inverse, weighted)
    dy = (dx if y is None else dy) if ctx.adds else None
    return dx, dy, dweight if weighted else None, None, None


torch.library.register_autograd("lkda::residual_norm", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients, results=2)


def residual_norm_cuda(
    x: Tensor, y: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The kernels, differentiable. Arguments as in `residual_norm`, with x of the data type of s."""
    inputs = (x, y, weight.float())
    forward: Callable = torch.ops.lkda.residual_norm
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if wants_gradient(*inputs) else launch_forward
    s, n, _ = forward(*inputs, eps, dtype)
    return s, n
