"""Simplified linear attention. It is memory-bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import simplified_attention
from lkda.ops.runtime.jit import Kernel
from lkda.ops.simplified.cuda import core

NAMES = ("q", "k", "v", "decay")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v ~ N(0, 1); decays with time constants from 4 to 10,000 tokens over the heads, and noise per token."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    q, k, v = (torch.randn(B, T, H, D, dtype=dtype, device=device) for _ in range(3))
    memory = torch.logspace(0.6, 4, H, device=device)
    decay = 1 - 2 * torch.rand(B, T, H, device=device) / memory.clamp_min(2)
    return {"q": q, "k": k, "v": v, "decay": decay}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads q, k, v, decay and writes o. Backward reads those and do, and writes dq, dk, dv and ddecay."""
    wide, decay = shape.elements * dtype.itemsize, 4 * shape.elements // shape.D
    forward, backward = 4 * wide + decay, 7 * wide + 2 * decay
    return forward if mode == "fwd" else forward + backward


def _lkda(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: simplified_attention(**inputs, backend=backend)


def _compiled(inputs: Inputs) -> Sequence[Tensor]:
    return _compiled_chunk()(**inputs, backend="chunk")


_programs: list[Callable[..., Sequence[Tensor]]] = []


def _compiled_chunk() -> Callable[..., Sequence[Tensor]]:
    if not _programs:
        _programs.append(torch.compile(simplified_attention, dynamic=False))
    return _programs[0]


def _fla() -> Mapping[str, Implementation]:
    """The most similar operator of FLA: h = exp(g) h + x per channel.

    It is another function, and it reads and writes one tensor fewer.
    """
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    def adapt(inputs: Inputs) -> Inputs:
        g = inputs["decay"].log()[..., None].expand_as(inputs["v"])
        return {"x": inputs["v"].flatten(2), "g": g.to(inputs["v"].dtype).flatten(2)}

    def implementation(function: Callable[..., Sequence[Tensor]]) -> Implementation:
        return Implementation(lambda inputs: function(**inputs), ("x", "g"), adapt, comparable=False)

    return {
        "fla chunk_hgrn": implementation(chunk_hgrn),
        "fla fused_recurrent_hgrn": implementation(fused_recurrent_hgrn),
    }


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    if word == "cuda":
        names = ("forward",) if mode == "fwd" else ("forward", "backward")
        return [core.scan_kernel(name, arch, shape.D, dtype, packed=False) for name in names]
    return [core.baseline_kernel(shape.D, dtype)] if word == "cuda_baseline" else []


BENCHMARK = OpBenchmark(
    op="simplified",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={
        "cuda": Implementation(_lkda("cuda"), NAMES),
        "cuda_baseline": Implementation(_lkda("cuda_baseline")),
        "chunk": Implementation(_lkda("chunk"), NAMES),
        "chunk_compiled": Implementation(_compiled, NAMES),
        "recurrent": Implementation(_lkda("recurrent"), NAMES),
    },
    peers={"fla": _fla},
    truth=_lkda("chunk"),
    kernels=kernels,
)
