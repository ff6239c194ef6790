"""The norm and the rotation of the heads of q and k on a GPU: one launch, and one for their backward, as custom ops."""

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
from lkda.ops.softmax.rotary import cos_sin

HERE = Path(__file__).parent

# As in the .cu files.
THREADS = 256
ROWS = {"forward": 2, "backward": 1}  # rows per thread at a time
MAX_BLOCKS = 396  # of the backward for q, each with a line of partial sums, and as many for k

reason_cannot_run = cannot_take(otherwise="torch")


@cache
def rotary_kernel(name: str, head_dim: int, dtype: torch.dtype) -> Kernel:
    """`forward` or `backward`."""
    module = Module(HERE / f"rotary_{name}.cu", {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype]})
    if name == "forward":
        return module.kernel("rotary_forward", "PPPPPPPPiiiiqqf")
    shared_bytes = 4 * head_dim * _rows_of_a_block(head_dim, dtype)
    return module.kernel("rotary_backward", "PPPPPPPPPPPiiiiqqf", shared_bytes=shared_bytes)


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    return [rotary_kernel(name, head_dim, dtype) for name in ROWS for head_dim in HEAD_DIMS for dtype in ELEMENTS]


def _rows_of_a_block(head_dim: int, dtype: torch.dtype) -> int:
    return THREADS * 2 * (16 // dtype.itemsize) // head_dim


def _blocks(name: str, q: Tensor, k: Tensor) -> int:
    """The number of blocks for q, and for k, so that each group of rows has one."""
    rows = max(q.numel(), k.numel()) // q.shape[-1]
    return -(-rows // (_rows_of_a_block(q.shape[-1], q.dtype) * ROWS[name]))


def _sizes(q: Tensor, k: Tensor, cosines: Tensor) -> tuple[int, int, int, int]:
    """Tokens, heads of q and of k, and rows of the cosines, as the kernels take them."""
    B, T, H, D = q.shape
    return B * T, H, k.shape[2], cosines.numel() // (D // 2)


def _with_stride(x: Tensor) -> tuple[Tensor, int]:
    """x [B, T, H, D] and the distance of its tokens: x itself if it is one and heads are contiguous, else a copy."""
    B, T, H, D = x.shape
    size, step = x.element_size(), x.stride(1)
    aligned = x.data_ptr() % 16 == 0 and step * size % 16 == 0
    if aligned and x.stride()[2:] == (D, 1) and (B == 1 or x.stride(0) == T * step):
        return x, step
    return readable(x), H * D


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def launch_forward(
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The turned heads, contiguous."""
    D = q.shape[3]
    (q, q_stride), (k, k_stride) = _with_stride(q), _with_stride(k)
    q_turned, k_turned = _like(q), _like(k)
    weights = (None if w is None else readable(w) for w in (q_weight, k_weight))
    tensors = (q, k, readable(cosines), readable(sines), *weights, q_turned, k_turned)
    sizes = (*_sizes(q, k, cosines), q_stride, k_stride, eps)
    blocks = 2 * _blocks("forward", q, k)
    rotary_kernel("forward", D, q.dtype)((blocks, 1, 1), THREADS, *tensors, *sizes, device=q.device)
    return q_turned, k_turned


def launch_backward(
    dq_turned: Tensor,
    dk_turned: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cosines: Tensor,
    sines: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, of k, and of the weights [2, D], empty where there are none; then q and k are not needed."""
    D = dq_turned.shape[3]
    dq_turned, dk_turned = readable(dq_turned), readable(dk_turned)
    (q, q_stride), (k, k_stride) = ((None, 0) if x is None else _with_stride(x) for x in (q, k))
    dq, dk = _like(dq_turned), _like(dk_turned)
    weights = [None if w is None else readable(w) for w in (q_weight, k_weight)]
    blocks = min(_blocks("backward", dq, dk), MAX_BLOCKS)
    partials = None if q_weight is None else torch.empty(blocks, 2 * D, dtype=torch.float32, device=dq.device)
    tensors = (dq_turned, dk_turned, q, k, readable(cosines), readable(sines), *weights, dq, dk, partials)
    sizes = (*_sizes(dq, dk, cosines), q_stride, k_stride, eps)
    rotary_kernel("backward", D, dq.dtype)((2 * blocks, 1, 1), THREADS, *tensors, *sizes, device=dq.device)
    empty = torch.empty(0, D, dtype=torch.float32, device=dq.device)
    return dq, dk, empty if partials is None else column_sums(partials).view(2, D)


_library = torch.library.Library("lkda", "FRAGMENT")
_inputs = "Tensor cosines, Tensor sines, Tensor? q_weight, Tensor? k_weight, float eps"
_library.define(f"rotary_heads(Tensor q, Tensor k, {_inputs}) -> (Tensor, Tensor)")
_library.define(
    f"rotary_heads_backward(Tensor dq_turned, Tensor dk_turned, Tensor? q, Tensor? k, {_inputs})"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("rotary_heads", launch_forward, "CUDA")
_library.impl("rotary_heads_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::rotary_heads", lib=_library)
def _(q, k, cosines, sines, q_weight, k_weight, eps):
    return _like(q), _like(k)


@torch.library.register_fake("lkda::rotary_heads_backward", lib=_library)
def _(dq_turned, dk_turned, q, k, cosines, sines, q_weight, k_weight, eps):
    weights = 0 if q_weight is None else 2
    dweights = torch.empty(weights, dq_turned.shape[-1], dtype=torch.float32, device=dq_turned.device)
    return _like(dq_turned), _like(dk_turned), dweights


def _save(ctx, inputs, output):
    q, k, *others, ctx.eps = inputs
    normed = others[-1] is not None
    ctx.save_for_backward(*((q, k) if normed else (None, None)), *others)


def _gradients(ctx, dq, dk):
    saved = ctx.saved_tensors
    bypass = can_bypass_dispatcher(dq, dk)
    backward: Callable = launch_backward if bypass else torch.ops.lkda.rotary_heads_backward
    dq, dk, dweights = backward(dq, dk, *saved, ctx.eps)
    return dq, dk, None, None, *(dweights.unbind(0) if len(dweights) else (None, None)), None


torch.library.register_autograd("lkda::rotary_heads", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients)


def rotary_heads_cuda(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    base: float | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The kernels, differentiable. Arguments as in `rotary_heads`."""
    weights = (None if w is None else w.float() for w in (q_weight, k_weight))
    inputs = (q, k, *cos_sin(position, q.shape[-1], base, torch.float32), *weights)
    forward: Callable = torch.ops.lkda.rotary_heads
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if wants_gradient(*inputs) else launch_forward
    return forward(*inputs, eps)
