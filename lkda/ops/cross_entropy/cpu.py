"""The rows of logits on a CPU, in C++."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.cpp import NAMES, Library
from lkda.targets import IGNORE_INDEX

LIBRARY = Library(Path(__file__).with_name("rows.cpp"))


def can_take(logits: Tensor) -> bool:
    """Whether the C++ can run on these logits."""
    usual = logits.device.type == "cpu" and logits.dtype in NAMES and logits.is_contiguous()
    return usual and LIBRARY.reason_cannot_run() is None


def rows_cpu(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [N], and the gradient, which is written over `logits` [N, V]. Arguments as of `rows_torch`."""
    losses = logits.new_empty(len(logits))
    arguments = (logits, *logits.shape, targets.contiguous(), IGNORE_INDEX, float(scale), losses)
    LIBRARY.call(f"cross_entropy_rows_{NAMES[logits.dtype]}", *arguments, torch.get_num_threads())
    return losses, logits
