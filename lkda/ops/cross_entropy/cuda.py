"""The kernel of the rows of logits on a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS
from lkda.targets import IGNORE_INDEX

THREADS = 512  # as in rows.cu


@cache
def rows_kernel(dtype: torch.dtype) -> Kernel:
    defines: dict[str, str | int | float] = {"ELEMENT": ELEMENTS[dtype], "IGNORE_INDEX": IGNORE_INDEX}
    module = Module(Path(__file__).with_name("rows.cu"), defines)
    return module.kernel("cross_entropy_rows", "PPPPi")


def kernels(arch: str) -> list[Kernel]:
    """Every kernel used on an architecture, for every dtype."""
    return [rows_kernel(dtype) for dtype in ELEMENTS]


def rows_cuda(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [N] in float32, and the gradient, which is written over `logits` [N, V] (contiguous, V a multiple of
    16 bytes: rows are aligned). `scale` is a float32 scalar; arguments otherwise as of `rows_torch`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    arguments = (logits, targets, scale, losses, logits.shape[1])
    rows_kernel(logits.dtype)((len(logits), 1, 1), THREADS, *arguments, device=logits.device)
    return losses, logits
