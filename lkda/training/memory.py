"""The memory of a training process: how much a step on a CPU needs at least, how the C library manages it, and what the
jobs before this one have left on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Mapping
from typing import Any

import torch

from lkda.checks import InputError

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Has the C library keep memory that is freed, for the next allocation, instead of returning it to the system.

    A training step allocates and frees the same tensors again and again. Memory that was returned comes back page by
    page, each filled with zeros: in small models that takes a sixth of a step. Only glibc has the setting. Returns
    whether it was set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1))


def return_freed_memory() -> bool:
    """Has the C library return memory that is freed to the system, also where it lies between blocks in use.

    It does so by itself only at the end of its heap. The copies of checkpoints are freed from the middle of it, and a
    few of them would otherwise stay with the process. Only glibc has the function. Returns whether it returned some.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))


def free_memory_of_earlier_runs() -> None:
    """Give back the memory of the GPU that earlier jobs of a sweep in this process have left, and forget their peak.

    A run's peak_memory_gib is then its own, and other processes on the GPU have room.
    """
    if not torch.cuda.is_initialized():
        return
    gc.collect()  # a trainer is in reference cycles
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def check_parameters(count: int, *, copies: int, available: int) -> None:
    """Raise InputError if the weights, their gradients and the state of the optimizer cannot fit into the memory, in
    which the system would kill the process without a message.

    Args:
        count: the number of parameters.
        copies: how many processes of the machine hold all of them.
        available: bytes.
    """
    needed = 12 * count * copies  # weights, gradients and at least one momentum, in float32
    if needed > available:
        raise InputError(
            f"a model of {count:,} parameters needs more than {needed / 2**30:,.0f} GiB of memory to train"
            f"{f' in {copies} processes' if copies > 1 else ''}, and the machine has {available / 2**30:,.0f} GiB: "
            "lower the size of the model."
        )


def check_activations(
    model: Mapping[str, Any], *, tokens: int, checkpointing: str, dtype: torch.dtype, available: int
) -> None:
    """Raise InputError if the activations of one batch cannot fit into the memory, in which the system would kill the
    process without a message. They are a lower bound: what the layers of every mixer keep for the backward pass.

    Args:
        model: the dict of `build_model`.
        tokens: the number of tokens of one batch.
        checkpointing: "none" or "block", which keeps only the input of each block.
        dtype: of the layers' inputs.
        available: bytes.
    """
    width = model["d_model"]
    # The inputs of a block's two norms and four linear layers, two projections, and the products of the MLP.
    of_block = dtype.itemsize * (8 * width + 3 * model["mlp_hidden"])
    kept = 4 * width if checkpointing == "block" else of_block
    needed = tokens * model["num_layers"] * kept
    if needed > available:
        raise InputError(
            f"one batch of {tokens:,} tokens needs more than {needed / 2**30:,.0f} GiB of memory, and the machine has "
            f"{available / 2**30:,.0f} GiB: lower data.batch_size (with trainer.accumulate_grad_batches in its place), "
            "data.context or the size of the model."
        )
