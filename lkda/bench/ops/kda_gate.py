"""The gates of a KDA layer, from logits to g and beta in float32. They are memory-bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.bench.ops import kda_layer
from lkda.ops.kda.cuda.gate import gate_kernel, kda_gate_cuda
from lkda.ops.kda.reference.gate import KDAGate, kda_gate_torch
from lkda.ops.runtime.jit import Kernel

NAMES = ("gate_logits", "beta_logits", "A_log", "dt_bias")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """The same as those of the layer's benchmark."""
    sampled = kda_layer.inputs(shape, dtype, device, gate)
    return {name: sampled[name] for name in NAMES}


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads logits and writes g. Backward reads logits and dg and writes the gradient of the logits. The same
    holds for beta."""
    wide, narrow = 4 * (shape.elements + shape.elements // shape.D), dtype.itemsize
    share = narrow / 4
    forward, backward = wide * (1 + share), wide * (1 + 2 * share)
    return int(forward if mode == "fwd" else forward + backward)


def _cuda(x: Inputs) -> Sequence[Tensor]:
    return kda_gate_cuda(
        *(x["gate_logits"], x["beta_logits"], KDAGate(x["A_log"], x["dt_bias"].view(-1))),
        head_dim=x["gate_logits"].shape[3],
    )


def _torch(x: Inputs) -> Sequence[Tensor]:
    gate = KDAGate(x["A_log"], x["dt_bias"])
    return kda_gate_torch(x["gate_logits"], x["beta_logits"], gate, head_dim=x["gate_logits"].shape[3])


def _fla() -> Mapping[str, Implementation]:
    """Its kernel computes the decay and PyTorch beta. (FLA's own layer lets the core operator compute both.)"""
    from fla.ops.kda.gate import fused_kda_gate

    def run(x: Inputs) -> Sequence[Tensor]:
        g = fused_kda_gate(x["gate_logits"], x["A_log"].view(-1), x["dt_bias"].view(-1))
        return g, torch.sigmoid(x["beta_logits"].float())

    return {"fla fused_kda_gate": Implementation(run, NAMES)}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    entries = ("kda_gate",) if mode == "fwd" else ("kda_gate", "kda_gate_backward")
    return [gate_kernel(entry, shape.D, dtype, False) for entry in entries] if word == "cuda" else []


BENCHMARK = OpBenchmark(
    op="kda_gate",
    gates=("slow", "fast"),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={"cuda": Implementation(_cuda, NAMES), "torch": Implementation(_torch, NAMES)},
    peers={"fla": _fla},
    truth=_torch,
    kernels=kernels,
    results=("g", "beta"),
    has_reference=kda_layer.has_reference,
)
