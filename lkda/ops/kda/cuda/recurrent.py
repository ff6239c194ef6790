"""KDA token by token in one kernel, forward only. Benchmarks use it to show what the recurrence itself costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.dispatch import wants_gradient
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take

reason_cannot_run = cannot_take(otherwise="chunk")


@dataclass(frozen=True)
class Variant:
    """How the kernel divides its work. Benchmarks measure other values than the defaults.

    Args:
        column_threads: that share a column of the state, a power of two.
        blocks: that a multiprocessor must be able to hold, for which the compiler limits the registers of a thread.
    """

    column_threads: int = 2
    blocks: int = 1


USUAL = Variant()


@cache
def recurrent_kernel(D: int, dtype: torch.dtype, variant: Variant) -> Kernel:
    defines: dict[str, str | int | float] = {
        "HEAD_DIM": D,
        "ELEMENT": ELEMENTS[dtype],
        "COLUMN_THREADS": variant.column_threads,
        "BLOCKS": variant.blocks,
    }
    module = Module(Path(__file__).with_name("recurrent.cu"), defines)
    return module.kernel("kda_recurrent", "PPPPPPPPPiif", shared_bytes=3 * 4 * D)  # q, k and the decay of a token


def kernels(arch: str) -> list[Kernel]:
    """Every variant: each head size and dtype. They are the same on all architectures."""
    return [recurrent_kernel(D, dtype, USUAL) for D in HEAD_DIMS for dtype in ELEMENTS]


def _outputs(v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uninitialised o and final_state."""
    B, _, H, D = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty((N, H, D, D), dtype=torch.float32, device=v.device),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    *,
    variant: Variant = USUAL,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel. Arguments and results are those of `kda_attention`, in the dtypes that the kernel reads."""
    _, T, H, D = q.shape
    inputs = [x.contiguous() for x in (q, k, v, g, beta)]
    o, final_state = _outputs(v, cu_seqlens)
    grid = (final_state.shape[0] * H, 1, 1)
    arguments = (*inputs, initial_state, o, final_state, cu_seqlens, T, H, scale)
    recurrent_kernel(D, q.dtype, variant)(grid, variant.column_threads * D, *arguments, device=q.device)
    return o, final_state


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "kda_recurrent(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale) -> (Tensor, Tensor)"
)
_library.impl("kda_recurrent", forward, "CUDA")


@torch.library.register_fake("lkda::kda_recurrent", lib=_library)
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale):
    return _outputs(v, cu_seqlens)


def kda_cuda_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, without gradients. Arguments and results are those of `kda_attention`.

    Raises: ValueError if K and V differ, or if an input requires a gradient.
    """
    if k.shape[-1] != v.shape[-1]:
        raise InputError(
            f"kda_attention(backend='cuda_recurrent'): K and V must be equal, got K = {k.shape[-1]} and "
            f"V = {v.shape[-1]}; use backend='recurrent'."
        )
    inputs = (q, k, v, g, beta, initial_state)
    if wants_gradient(*inputs):
        raise InputError(
            "kda_attention(backend='cuda_recurrent') has no backward and an input requires a gradient; "
            "use backend='cuda', or call it under torch.no_grad()."
        )
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    return torch.ops.lkda.kda_recurrent(q, k, v, g.float(), beta.float(), initial_state, cu_seqlens, scale)
