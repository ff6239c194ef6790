"""The gated RMSNorm of heads. It is memory-bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import gated_rms_norm
from lkda.ops.gated_norm.cuda import norm_kernel
from lkda.ops.runtime.jit import Kernel

NAMES = ("x", "gate", "norm")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """x and gate [B, T, H, D] ~ N(0, 1); the weight [1, 1, 1, D] near 1 in float32."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    x, sampled = (torch.randn(B, T, H, D, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "gate": sampled, "norm": 1 + 0.1 * torch.randn(1, 1, 1, D, device=device)}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads x and gate and writes y. Backward reads x, gate and dy and writes two gradients."""
    return shape.elements * dtype.itemsize * (3 if mode == "fwd" else 8)


def _lkda(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda x: (gated_rms_norm(x["x"], x["gate"], x["norm"].view(-1), backend=backend),)


def _fla() -> Mapping[str, Implementation]:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    def run(x: Inputs) -> Sequence[Tensor]:
        return (rms_norm_gated(x["x"], x["gate"], x["norm"].view(-1), None, activation="sigmoid", eps=1e-5),)

    return {"fla rms_norm_gated": Implementation(run, NAMES)}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    names = ("forward",) if mode == "fwd" else ("forward", "backward")
    return [norm_kernel(name, shape.D, dtype) for name in names] if word == "cuda" else []


BENCHMARK = OpBenchmark(
    op="gated_norm",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={word: Implementation(_lkda(word), NAMES) for word in ("cuda", "torch")},
    peers={"fla": _fla},
    truth=_lkda("torch"),
    kernels=kernels,
    has_reference=lambda name, shape: name != "norm",
)
