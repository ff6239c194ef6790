"""The short convolutions of q, k and v with the norm of q's and k's heads: it only moves memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.contest import Contest, Entrant, Inputs, Shape
from lkda.ops import short_convolutions
from lkda.ops.runtime.jit import Kernel
from lkda.ops.short_conv.cuda import conv_kernel

WIDTH = 4
STREAMS = ("q", "k", "v")
NAMES = (*STREAMS, *(f"{name}_conv" for name in STREAMS))


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v ~ N(0, 1), filters U(-1/2, 1/2) in float32 [1, 1, H, D, width]."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    drawn = {name: torch.randn(B, T, H, D, dtype=dtype, device=device) for name in STREAMS}
    return drawn | {f"{name}_conv": torch.rand(1, 1, H, D, WIDTH, device=device) - 0.5 for name in STREAMS}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward: x in, y out. Backward: x and dy in, dx out. Three streams."""
    wide = shape.elements * dtype.itemsize
    return 3 * wide * (2 if mode == "fwd" else 5)


def _ours(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    def run(x: Inputs) -> Sequence[Tensor]:
        streams = [x[name].flatten(2) for name in STREAMS]
        filters = [x[f"{name}_conv"].view(-1, 1, WIDTH) for name in STREAMS]
        return short_convolutions(
            streams, filters, normalized=(True, True, False), head_dim=x["q"].shape[3], backend=backend
        )[0]

    return run


def _fla() -> Mapping[str, Entrant]:
    """Three convolutions and two norms."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.l2norm import l2norm

    def run(x: Inputs) -> Sequence[Tensor]:
        filters = (x[f"{name}_conv"].view(-1, WIDTH) for name in STREAMS)
        heads = x["q"].shape[2:]
        q, k, v = (causal_conv1d(x[n].flatten(2), w, activation="silu")[0] for n, w in zip(STREAMS, filters))
        return l2norm(q.unflatten(2, heads)).flatten(2), l2norm(k.unflatten(2, heads)).flatten(2), v

    return {"fla conv + l2norm": Entrant(run, NAMES)}


def _heads(run: Callable[[Inputs], Sequence[Tensor]]) -> Callable[[Inputs], Sequence[Tensor]]:
    """With results [B, T, H, D], of which a few heads can be looked at."""
    return lambda x: [y.unflatten(2, x["q"].shape[2:]) for y in run(x)]


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    names = ("forward",) if mode == "fwd" else ("forward", "backward")
    return [conv_kernel(name, shape.D, dtype, True) for name in names] if word == "cuda" else []


CONTEST = Contest(
    op="short_conv",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={word: Entrant(_heads(_ours(word)), NAMES) for word in ("cuda", "torch")},
    peers={"fla": lambda: {name: Entrant(_heads(x.run), NAMES) for name, x in _fla().items()}},
    truth=_heads(_ours("torch")),
    kernels=kernels,
    results=("y_q", "y_k", "y_v"),
    told=lambda name, shape: name in STREAMS or shape.B == 1,
)
