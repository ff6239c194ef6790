"""Sampling on a GPU: one launch, with a block per row that keeps the weights of all tokens in shared memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.runtime.jit import SHARED_BYTES_PER_BLOCK, Kernel, Module, architecture, reason_cannot_run
from lkda.ops.runtime.kernel_inputs import ELEMENTS, readable

THREADS = 1024


def cannot_run(device: torch.device, vocab_size: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run, or None if it can."""
    reason = reason_cannot_run(device)
    if reason is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the kernel takes float32 and bfloat16, got {dtype}; use backend='torch'."
    limit = SHARED_BYTES_PER_BLOCK.get(architecture(device), 99 * 1024)
    if shared_bytes(vocab_size) > limit:
        return f"the kernel holds {limit:,} bytes of a row, too few for {vocab_size:,} tokens; use backend='torch'."
    return None


def shared_bytes(vocab_size: int) -> int:
    return -(-4 * vocab_size // 16) * 16 + 8 * (THREADS + THREADS // 32)


def kernels(arch: str) -> list[Kernel]:
    """Every variant, for 32,000 tokens or as many as fit: they differ by dtype alone."""
    most = min(32000, (SHARED_BYTES_PER_BLOCK[arch] - shared_bytes(0)) // 16 * 4)
    return [sample_kernel(most, dtype) for dtype in (torch.float32, torch.bfloat16)]


@cache
def sample_kernel(vocab_size: int, dtype: torch.dtype) -> Kernel:
    module = Module(Path(__file__).with_name("sample.cu"), {"ELEMENT": ELEMENTS[dtype]})
    return module.kernel("sample", "PPPPifidf", shared_bytes=shared_bytes(vocab_size))


def sample_cuda(
    logits: Tensor, keys: Tensor, positions: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """Arguments as in `sample_torch`."""
    tokens = torch.empty_like(keys)
    arguments = (readable(logits), keys, positions, tokens, logits.shape[1], temperature, top_k, top_p, min_p)
    sample_kernel(logits.shape[1], logits.dtype)((len(logits), 1, 1), THREADS, *arguments, device=logits.device)
    return tokens
