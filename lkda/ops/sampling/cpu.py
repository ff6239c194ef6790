"""Sampling on a CPU: a call of sample.cpp, which sorts only the few tokens that decide the nucleus."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.cpp import Library, cpu_only

LIBRARY = Library(Path(__file__).with_name("sample.cpp"))

reason_cannot_run = cpu_only(LIBRARY, otherwise="torch")


def sample_cpu(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Arguments as in `sample_torch`."""
    tokens = torch.empty_like(keys, memory_format=torch.contiguous_format)
    given = logits.float().contiguous(), keys.contiguous(), positions.contiguous()
    LIBRARY.call("sample", *logits.shape, *given, temperature, top_k, top_p, min_p, tokens, torch.get_num_threads())
    return tokens
