"""Simplified linear attention: it only moves memory, so the floor is bytes over the memory's speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.contest import Contest, Entrant, Inputs, Shape
from lkda.ops import simplified_attention
from lkda.ops.runtime.jit import Kernel
from lkda.ops.simplified.cuda import core as cuda

NAMES = ("q", "k", "v", "decay")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v ~ N(0, 1); decays of heads that remember from 4 tokens to 10,000, jittered from token to token."""
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    q, k, v = (torch.randn(B, T, H, D, dtype=dtype, device=device) for _ in range(3))
    memory = torch.logspace(0.6, 4, H, device=device)
    decay = 1 - 2 * torch.rand(B, T, H, device=device) / memory.clamp_min(2)
    return {"q": q, "k": k, "v": v, "decay": decay}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward: q, k, v, decay in, o out. Backward: q, k, v, do, decay in, dq, dk, dv, ddecay out."""
    wide, decay = shape.elements * dtype.itemsize, 4 * shape.elements // shape.D
    forward, backward = 4 * wide + decay, 7 * wide + 2 * decay
    return forward if mode == "fwd" else forward + backward


def _ours(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: simplified_attention(**inputs, backend=backend)


def _compiled(inputs: Inputs) -> Sequence[Tensor]:
    return _compiled_chunk()(**inputs, backend="chunk")


_programs: list[Callable[..., Sequence[Tensor]]] = []


def _compiled_chunk() -> Callable[..., Sequence[Tensor]]:
    if not _programs:
        _programs.append(torch.compile(simplified_attention, dynamic=False))
    return _programs[0]


def _fla() -> Mapping[str, Entrant]:
    """The nearest there is: h = exp(g) h + x a channel, one tensor fewer in and out than ours, another function."""
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    def adapt(inputs: Inputs) -> Inputs:
        g = inputs["decay"].log()[..., None].expand_as(inputs["v"])
        return {"x": inputs["v"].flatten(2), "g": g.to(inputs["v"].dtype).flatten(2)}

    def entrant(function: Callable[..., Sequence[Tensor]]) -> Entrant:
        return Entrant(lambda inputs: function(**inputs), ("x", "g"), adapt, comparable=False)

    return {"chunk_hgrn": entrant(chunk_hgrn), "fused_recurrent_hgrn": entrant(fused_recurrent_hgrn)}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    if word == "cuda":
        names = ("forward",) if mode == "fwd" else ("forward", "backward")
        return [cuda.scan_kernel(name, arch, shape.D, dtype, packed=False) for name in names]
    return [cuda.baseline_kernel(shape.D, dtype)] if word == "cuda_baseline" else []


CONTEST = Contest(
    op="simplified",
    gates=(None,),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={
        "cuda": Entrant(_ours("cuda"), NAMES),
        "cuda_baseline": Entrant(_ours("cuda_baseline")),
        "chunk": Entrant(_ours("chunk"), NAMES),
        "chunk_compiled": Entrant(_compiled, NAMES),
        "recurrent": Entrant(_ours("recurrent"), NAMES),
    },
    peers={"fla": _fla},
    truth=_ours("chunk"),
    kernels=kernels,
)
