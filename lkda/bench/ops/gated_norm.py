"""RMSNorm of heads, gated: it only moves memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.contest import Contest, Entrant, Inputs, Shape
from lkda.ops import gated_rms_norm
from lkda.ops.gated_norm.cuda import norm_kernel
from lkda.ops.runtime.jit import Kernel

NAMES = ("x", "gate", "norm")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """x and gate ~ N(0, 1), the weight near 1 in float32 [1, 1, 1, D]."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    x, drawn = (torch.randn(B, T, H, D, dtype=dtype, device=device) for _ in range(2))
    return {"x": x, "gate": drawn, "norm": 1 + 0.1 * torch.randn(1, 1, 1, D, device=device)}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward: x and gate in, y out. Backward: those and dy in, two gradients out."""
    return shape.elements * dtype.itemsize * (3 if mode == "fwd" else 8)


def _ours(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda x: (gated_rms_norm(x["x"], x["gate"], x["norm"].view(-1), backend=backend),)


def _fla() -> Mapping[str, Entrant]:
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    def run(x: Inputs) -> Sequence[Tensor]:
        return (rms_norm_gated(x["x"], x["gate"], x["norm"].view(-1), None, activation="sigmoid", eps=1e-5),)

    return {"fla rms_norm_gated": Entrant(run, NAMES)}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    names = ("forward",) if mode == "fwd" else ("forward", "backward")
    return [norm_kernel(name, shape.D, dtype) for name in names] if word == "cuda" else []


CONTEST = Contest(
    op="gated_norm",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={word: Entrant(_ours(word), NAMES) for word in ("cuda", "torch")},
    peers={"fla": _fla},
    truth=_ours("torch"),
    kernels=kernels,
    told=lambda name, shape: name != "norm",
)
