"""The short convolutions of q, k and v with the norm of the heads of q and k. They are memory-bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import short_convolutions
from lkda.ops.runtime.jit import Kernel
from lkda.ops.short_conv.cuda import conv_kernel

WIDTH = 4
STREAMS = ("q", "k", "v")
NAMES = (*STREAMS, *(f"{name}_conv" for name in STREAMS))


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v [B, T, H, D] ~ N(0, 1), filters [1, 1, H, D, width] ~ U(-1/2, 1/2) in float32."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    sampled = {name: torch.randn(B, T, H, D, dtype=dtype, device=device) for name in STREAMS}
    return sampled | {f"{name}_conv": torch.rand(1, 1, H, D, WIDTH, device=device) - 0.5 for name in STREAMS}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads x and writes y. Backward reads x and dy and writes dx. There are three tensors of each."""
    wide = shape.elements * dtype.itemsize
    return 3 * wide * (2 if mode == "fwd" else 5)


def _lkda(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    def run(x: Inputs) -> Sequence[Tensor]:
        streams = [x[name].flatten(2) for name in STREAMS]
        filters = [x[f"{name}_conv"].view(-1, 1, WIDTH) for name in STREAMS]
        return short_convolutions(
            streams, filters, normalized=(True, True, False), head_dim=x["q"].shape[3], backend=backend
        )[0]

    return run


def _fla() -> Mapping[str, Implementation]:
    """FLA needs three convolutions and two norms."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.l2norm import l2norm

    def run(x: Inputs) -> Sequence[Tensor]:
        filters = (x[f"{name}_conv"].view(-1, WIDTH) for name in STREAMS)
        heads = x["q"].shape[2:]
        q, k, v = (causal_conv1d(x[n].flatten(2), w, activation="silu")[0] for n, w in zip(STREAMS, filters))
        return l2norm(q.unflatten(2, heads)).flatten(2), l2norm(k.unflatten(2, heads)).flatten(2), v

    return {"fla conv + l2norm": Implementation(run, NAMES)}


def _heads(run: Callable[[Inputs], Sequence[Tensor]]) -> Callable[[Inputs], Sequence[Tensor]]:
    """`run` with its results as [B, T, H, D], so that a few heads can be compared."""
    return lambda x: [y.unflatten(2, x["q"].shape[2:]) for y in run(x)]


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    names = ("forward",) if mode == "fwd" else ("forward", "backward")
    return [conv_kernel(name, shape.D, dtype, True) for name in names] if word == "cuda" else []


BENCHMARK = OpBenchmark(
    op="short_conv",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={word: Implementation(_heads(_lkda(word)), NAMES) for word in ("cuda", "torch")},
    peers={"fla": lambda: {name: Implementation(_heads(x.run), NAMES) for name, x in _fla().items()}},
    truth=_heads(_lkda("torch")),
    kernels=kernels,
    results=("y_q", "y_k", "y_v"),
    has_reference=lambda name, shape: name in STREAMS or shape.B == 1,
)
