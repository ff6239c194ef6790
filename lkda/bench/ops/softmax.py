"""Causal softmax attention: PyTorch's fused kernels beside a naive kernel without tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import softmax_attention
from lkda.ops.runtime.jit import Kernel
from lkda.ops.softmax.cuda.naive import naive_kernel

NAMES = ("q", "k", "v")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v ~ N(0, 1)."""
    size = (shape.B, shape.T, shape.H, shape.D)
    return {name: torch.randn(size, dtype=dtype, device=device) for name in NAMES}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads q, k, v and writes o. Backward reads those and do, and writes dq, dk and dv."""
    wide = shape.elements * dtype.itemsize
    return 4 * wide if mode == "fwd" else 12 * wide


def _lkda(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: (softmax_attention(*(inputs[name] for name in NAMES), backend=backend),)


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    return [naive_kernel(shape.D, dtype)] if word == "cuda_naive" else []


BENCHMARK = OpBenchmark(
    op="softmax",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={
        "sdpa": Implementation(_lkda("sdpa"), NAMES),
        "naive": Implementation(_lkda("naive"), NAMES),
        "cuda_naive": Implementation(_lkda("cuda_naive")),
    },
    peers={},
    truth=_lkda("naive"),
    kernels=kernels,
)
