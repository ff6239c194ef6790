"""Linear layers of a few tokens on a GPU: launches of the kernel of linear.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module, multiprocessors, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import readable

THREADS = 128
AHEAD = 4  # 16-byte parts of a row that a lane asks for at first, as in linear.cu
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float"}
PLAIN, NORM, HEAD_NORM = range(3)  # what comes before the product
STORE, ADD, SWIGLU = range(3)  # what becomes of it
# Layers of at least so many outputs, such as the head, give each warp several rows of the weight: so many, for each
# number of tokens that the kernel is compiled for. With more tokens, the matrix units are faster.
MANY_OUTPUTS = 8192
ROWS_OF_A_WARP = {1: 4, 4: 2}
MOST_TOKENS = max(ROWS_OF_A_WARP)
# Warps that can share a row.
SPLITS = (1, 4)
_VARIANTS = ((NORM, STORE), (NORM, SWIGLU), (PLAIN, ADD), (HEAD_NORM, ADD))
ROWS_OF_A_MULTIPROCESSOR = 32
ROWS_OF_A_WARP = {1: 4, 2: 4, 4: 2, 8: 2}


def cannot_run(device: torch.device, tokens: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if device.type == "cuda" and tokens > MOST_TOKENS:
        return f"the kernel takes {MOST_TOKENS} tokens at most, got {tokens}; use backend='torch'."
    if device.type == "cuda" and dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float32, got {dtype}; use backend='torch'."
    return reason_cannot_run(device)


@cache
def linear_kernel(dtype: torch.dtype, before: int, after: int, tokens: int, rows: int, split: int) -> Kernel:
    defines: dict[str, str | int | float] = {"ELEMENT": DTYPES[dtype], "PROLOGUE": before, "EPILOGUE": after}
    defines |= {"TOKENS": tokens, "OUT": rows, "SPLIT": split}
    module = Module(Path(__file__).with_name("linear.cu"), defines)
    shared_bytes = 4 * THREADS // 32 * ((2 if after == SWIGLU else 1) * rows + 1) * tokens
    return module.kernel("token_linear", "PPPPPiiiiiiiif", shared_bytes=shared_bytes, overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant that the functions below launch."""
    found = []
    for dtype in DTYPES:
        for tokens, rows in ROWS_OF_A_WARP.items():
            found += [
                linear_kernel(dtype, NORM, STORE, tokens, rows, 1),
                linear_kernel(dtype, PLAIN, STORE, tokens, 1, 1),
            ]
            for split in SPLITS:
                found += [linear_kernel(dtype, *variant, tokens, 1, split) for variant in _VARIANTS]
    return found


def _split(parts: int, outputs: int, device: torch.device) -> int:
    """How many warps share a row of `parts` 16-byte parts: so many that a lane asks for its parts of the row at once,
    unless the rows alone give every multiprocessor work enough."""
    enough = outputs > ROWS_OF_A_MULTIPROCESSOR * multiprocessors(device)
    return 1 if enough else next((n for n in SPLITS if parts <= 32 * AHEAD * n), SPLITS[-1])


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
    tokens = next(count for count in ROWS_OF_A_WARP if count >= B)
    group_rows = outputs
    outputs = outputs // 2 if after == SWIGLU else weight.numel() // inputs
    many = outputs >= MANY_OUTPUTS and (before, after) == (NORM, STORE)
    rows = ROWS_OF_A_WARP[tokens] if many else 1
    split = 1 if rows > 1 else _split(inputs * x.element_size() // 16, outputs, x.device)
    blocks = -(-outputs // (THREADS // 32 // split * rows))
    strides = x.stride(0), 0 if gate is None else gate.stride(0), y.stride(0)
    linear_kernel(x.dtype, before, after, tokens, rows, split)(
        (blocks, 1, 1),
        THREADS,
        *(x, gate, norm, weight, y, inputs, outputs, B, *strides, group_rows, head_dim, eps),
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
