"""Sums over rows, in an order that is the same in every run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module

HERE = Path(__file__).parent
THREADS, COLUMNS = 1024, 32  # per block


@cache
def sums_kernel() -> Kernel:
    return Module(HERE / "column_sums.cu", {}).kernel("column_sums", "PPii", shared_bytes=4 * THREADS)


def kernels(arch: str) -> list[Kernel]:
    """Every kernel used on an architecture."""
    return [sums_kernel()]


def column_sums(x: Tensor) -> Tensor:
    """[rows, columns] float32, contiguous, on a CUDA device -> [columns]."""
    rows, columns = x.shape
    y = torch.empty(columns, dtype=torch.float32, device=x.device)
    sums_kernel()((-(-columns // COLUMNS), 1, 1), THREADS, x, y, rows, columns, device=x.device)
    return y
