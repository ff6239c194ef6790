"""Matrix products in float32 on a CPU, with the library that is faster there.

PyTorch multiplies float32 matrices with MKL, which uses 512-bit instructions on Intel's processors alone. oneDNN, which
is part of PyTorch too, uses them on every processor that has them: on an AMD EPYC of the Zen 5 generation its products
take half the time (docs/dev/cpu.md). PyTorch reaches it through an operator of torch.compile's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops.derivatives import refusing_second_derivatives
from lkda.ops.runtime.dispatch import can_bypass_dispatcher

# Smaller products gain nothing.
_SMALLEST = 32


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN has instructions here that MKL does not use."""
    known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    if not known or not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        vendors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")]
    except OSError:  # not Linux
        return False
    return bool(vendors) and "GenuineIntel" not in vendors[0]


def _uses_onednn(rows: int, inner: int, columns: int, *tensors: Tensor) -> bool:
    return (
        min(rows, inner, columns) >= _SMALLEST
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and can_bypass_dispatcher(*tensors)
        and _onednn_is_faster()
    )


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N]. Not differentiable where gradients are recorded: `linear` is."""
    if _uses_onednn(a.shape[0], a.shape[1], b.shape[1], a, b):
        return _product(a, b)
    return a @ b


def _product(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).t(), None, "none", [], "")
    return result


def _dense(x: Tensor) -> Tensor:
    """x, copied if it is a part of a larger matrix: oneDNN multiplies these a thousand times slower."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., inputs] times weightᵀ, weight [outputs, inputs]: `torch.nn.functional.linear` without a bias."""
    if _uses_onednn(x.numel() // max(1, x.shape[-1]), x.shape[-1], weight.shape[0], x, weight):
        y: Tensor = _Linear.apply(x, weight)
        return y
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @refusing_second_derivatives
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        wants_x, wants_weight = ctx.needs_input_grad
        dx = _product(rows, weight).view(x.shape) if wants_x else None
        return dx, _product(rows.t(), x.reshape(-1, x.shape[-1])) if wants_weight else None
