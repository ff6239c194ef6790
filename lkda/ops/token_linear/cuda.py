"""Linear layers of a few tokens on a GPU: launches of the kernel of linear.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, readable

THREADS = 128
# The kernel is compiled for these numbers of tokens. With more, the matrix units are faster.
TOKENS = (1, 4, 8)
PLAIN, NORM, HEAD_NORM = range(3)  # what comes before the product
STORE, ADD, SWIGLU = range(3)  # what becomes of it
# Layers of at least so many outputs, such as the head, give each warp several rows of the weight.
MANY_OUTPUTS = 8192
ROWS_OF_A_WARP = {1: 4, 4: 2, 8: 1}


def cannot_run(device: torch.device, tokens: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if device.type == "cuda" and tokens > TOKENS[-1]:
        return f"the kernel takes {TOKENS[-1]} tokens at most, got {tokens}; use backend='torch'."
    if device.type == "cuda" and dtype not in ELEMENTS:
        return f"the kernel takes bfloat16, float16 and float32, got {dtype}; use backend='torch'."
    return reason_cannot_run(device)


@cache
def linear_kernel(dtype: torch.dtype, before: int, after: int, tokens: int, rows: int, head_dim: int) -> Kernel:
    defines: dict[str, str | int | float] = {"ELEMENT": ELEMENTS[dtype], "PROLOGUE": before, "EPILOGUE": after}
    defines |= {"TOKENS": tokens, "OUT": rows, "HEAD_DIM": head_dim}
    module = Module(Path(__file__).with_name("linear.cu"), defines)
    return module.kernel("token_linear", "PPPPPiiiiiiif", overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant that the functions below launch."""
    found = []
    for dtype in ELEMENTS:
        for tokens in TOKENS:
            found += [linear_kernel(dtype, NORM, STORE, tokens, rows, 0) for rows in {1, ROWS_OF_A_WARP[tokens]}]
            found += [linear_kernel(dtype, NORM, SWIGLU, tokens, 1, 0), linear_kernel(dtype, PLAIN, ADD, tokens, 1, 0)]
            found += [linear_kernel(dtype, PLAIN, STORE, tokens, 1, 0)]
            found += [linear_kernel(dtype, HEAD_NORM, ADD, tokens, 1, head_dim) for head_dim in HEAD_DIMS]
    return found


def _launch(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    before: int,
    after: int,
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    head_dim: int = 0,
) -> None:
    """x [B, ...] and y [B, outputs], whose rows are contiguous and aligned to 16 bytes; weight [(groups,) out, in]."""
    B, (outputs, inputs) = len(x), weight.shape[-2:]
    tokens = next(count for count in TOKENS if count >= B)
    group_rows = outputs
    outputs = outputs // 2 if after == SWIGLU else weight.numel() // inputs
    rows = ROWS_OF_A_WARP[tokens] if outputs >= MANY_OUTPUTS and (before, after) == (NORM, STORE) else 1
    blocks = -(-outputs // (THREADS // 32 * rows))
    strides = x.stride(0), 0 if gate is None else gate.stride(0), y.stride(0)
    linear_kernel(x.dtype, before, after, tokens, rows, head_dim)(
        (blocks, 1, 1),
        THREADS,
        *(x, gate, norm, weight, y, inputs, outputs, B, *strides, group_rows, eps),
        device=x.device,
    )


def _rows(x: Tensor) -> Tensor:
    """x if the kernel can read its rows as they are, else a copy."""
    fits = x[0].is_contiguous() and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if fits else readable(x)


def normed_linear_cuda(x: Tensor, norm: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    y = x.new_empty(len(x), weight.shape[0] // (2 if swiglu else 1))
    after = SWIGLU if swiglu else STORE
    _launch(_rows(x), weight, y, before=NORM, after=after, norm=readable(norm.float()), eps=eps)
    return y


def grouped_linear_cuda(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    y = x.new_empty(len(x), weight.shape[0] * weight.shape[1])
    _launch(_rows(x), weight, y, before=PLAIN, after=STORE)
    return y.chunk(len(weight), -1)


def add_linear_cuda(x: Tensor, y: Tensor, weight: Tensor) -> None:
    _launch(_rows(y), weight, x, before=PLAIN, after=ADD)


def add_gated_linear_cuda(x: Tensor, o: Tensor, gate: Tensor | None, norm: Tensor, weight: Tensor, eps: float) -> None:
    gate = None if gate is None else _rows(gate)
    o, head_dim = _rows(o.flatten(1)), o.shape[-1]
    _launch(
        o, weight, x, before=HEAD_NORM, after=ADD, gate=gate, norm=readable(norm.float()), eps=eps, head_dim=head_dim
    )
