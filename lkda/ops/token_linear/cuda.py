"""Linear layers of a few tokens on a GPU: launches of the kernel of linear.cu."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module, multiprocessors, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import readable, readable_rows

THREADS = 128
AHEAD = 4  # 16-byte parts of a row that a lane asks for at first, as in linear.cu
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float"}
# The numbers of tokens that the kernel is compiled for. With more tokens, the matrix units are faster. In float32, more
# than one would need too many registers.
TOKENS = {torch.bfloat16: (1, 4), torch.float32: (1,)}
PLAIN, NORM, HEAD_NORM = range(3)  # what comes before the product
# Layers of at least so many outputs, such as the head, give each warp several rows of the weight, by number of tokens.
MANY_OUTPUTS = 8192
ROWS_OF_A_WARP = {1: 4, 4: 2}
# Warps that share a row; with so many rows per multiprocessor, none do.
SPLITS = (1, 2, 4)
ROWS_OF_A_MULTIPROCESSOR = 32


def cannot_run(device: torch.device, tokens: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    if device.type == "cuda" and dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float32, got {dtype}; use backend='torch'."
    if device.type == "cuda" and tokens > TOKENS[dtype][-1]:
        name = {kind: str(kind).removeprefix("torch.") for kind in TOKENS}
        most = " and ".join(f"{counts[-1]} in {name[kind]}" for kind, counts in TOKENS.items())
        return f"the kernel takes few tokens (at most {most}), got {tokens} in {name[dtype]}. Use backend='torch'."
    return reason_cannot_run(device)


@cache
def linear_kernel(dtype: torch.dtype, before: int, swiglu: bool, tokens: int, rows: int) -> Kernel:
    defines: dict[str, str | int | float] = {"ELEMENT": DTYPES[dtype], "PROLOGUE": before, "SWIGLU": int(swiglu)}
    module = Module(Path(__file__).with_name("linear.cu"), defines | {"TOKENS": tokens, "OUT": rows})
    shared_bytes = 4 * THREADS // 32 * ((1 + swiglu) * rows + 1) * tokens
    return module.kernel("token_linear", "P" * 5 + "i" * 10 + "f", shared_bytes=shared_bytes, overlapping=True)


def kernels(arch: str) -> list[Kernel]:
    """Every variant that the functions below launch."""
    found = []
    for dtype in DTYPES:
        for tokens in TOKENS[dtype]:
            rows = ROWS_OF_A_WARP[tokens]
            found += [linear_kernel(dtype, before, False, tokens, 1) for before in (PLAIN, NORM, HEAD_NORM)]
            found += [linear_kernel(dtype, NORM, True, tokens, 1), linear_kernel(dtype, NORM, False, tokens, rows)]
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
    before: int = PLAIN,
    swiglu: bool = False,
    adds: bool = False,
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    head_dim: int = 0,
) -> None:
    """x [B, ...] and y [B, outputs], whose rows are contiguous and aligned to 16 bytes; weight [(groups,) out, in]."""
    B, (group_rows, inputs) = len(x), weight.shape[-2:]
    tokens = next(count for count in TOKENS[x.dtype] if count >= B)
    outputs = weight.numel() // inputs // (1 + swiglu)
    rows = ROWS_OF_A_WARP[tokens] if outputs >= MANY_OUTPUTS and before == NORM and not swiglu else 1
    split = 1 if rows > 1 else _split(inputs * x.element_size() // 16, outputs, x.device)
    blocks = -(-outputs // (THREADS // 32 // split * rows))
    strides = x.stride(0), 0 if gate is None else gate.stride(0), y.stride(0)
    linear_kernel(x.dtype, before, swiglu, tokens, rows)(
        (blocks, 1, 1),
        THREADS,
        *(x, gate, norm, weight, y, inputs, outputs, B, *strides, group_rows, head_dim, split, int(adds), eps),
        device=x.device,
    )


def normed_linear_cuda(x: Tensor, norm: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    y = x.new_empty(len(x), weight.shape[0] // (1 + swiglu))
    _launch(readable_rows(x), weight, y, before=NORM, swiglu=swiglu, norm=readable(norm.float()), eps=eps)
    return y


def grouped_linear_cuda(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    y = x.new_empty(len(x), weight.shape[0] * weight.shape[1])
    _launch(readable_rows(x), weight, y)
    return y.chunk(len(weight), -1)


def add_linear_cuda(x: Tensor, y: Tensor, weight: Tensor) -> None:
    _launch(readable_rows(y), weight, x, adds=True)


def add_gated_linear_cuda(x: Tensor, o: Tensor, gate: Tensor | None, norm: Tensor, weight: Tensor, eps: float) -> None:
    gate = None if gate is None else readable_rows(gate)
    scale, head_dim = readable(norm.float()), o.shape[-1]
    _launch(
        *(readable_rows(o.flatten(1)), weight, x),
        before=HEAD_NORM,
        adds=True,
        gate=gate,
        norm=scale,
        eps=eps,
        head_dim=head_dim,
    )
