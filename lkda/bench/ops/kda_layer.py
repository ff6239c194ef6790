"""The KDA layer without its projections: convolutions, norms, gates, the attention, and the output norm and gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import KDAGate, gated_rms_norm, kda_attention_fused, short_convolutions
from lkda.ops.gated_norm.cuda import norm_kernel
from lkda.ops.kda.cuda.gate import gate_kernel
from lkda.ops.runtime.jit import Kernel
from lkda.ops.short_conv.cuda import conv_kernel

WIDTH = 4  # of the convolutions
TOKENWISE = ("q", "k", "v", "gate_logits", "beta_logits", "output_gate")
PARAMETERS = ("q_conv", "k_conv", "v_conv", "A_log", "dt_bias", "norm")


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """The outputs of the projections, ~ N(0, 1), and the layer's parameters in float32, with heads on the third axis.

    With the gate "slow", A and dt are as in a newly initialised layer and the decay depends little on the token. With
    "fast", dt_bias is 0 and the logits are N(0, 1).
    """
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    sampled = {name: torch.randn(B, T, H, D, dtype=dtype, device=device) for name in TOKENWISE if name != "beta_logits"}
    if gate == "slow":
        sampled["gate_logits"] *= 0.1
    sampled["beta_logits"] = torch.randn(B, T, H, dtype=dtype, device=device)
    dt = torch.exp(math.log(1e-3) + math.log(100) * torch.rand(1, 1, H, D, device=device))
    filters = {f"{name}_conv": torch.rand(1, 1, H, D, WIDTH, device=device) - 0.5 for name in "qkv"}
    return {
        **sampled,
        **filters,
        "A_log": torch.log(1 + 15 * torch.rand(1, 1, H, device=device)),
        "dt_bias": torch.log(torch.expm1(dt)) if gate == "slow" else torch.zeros_like(dt),
        "norm": 1 + 0.1 * torch.randn(1, 1, 1, D, device=device),
    }


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads q, k, v, both gates, beta and writes y. Backward reads those and dy and writes their gradients."""
    wide, beta = shape.elements * dtype.itemsize, shape.elements // shape.D * dtype.itemsize
    forward, backward = 6 * wide + beta, 11 * wide + 2 * beta
    return forward if mode == "fwd" else forward + backward


def has_reference(name: str, shape: Shape) -> bool:
    """False for parameters whose gradient sums over sequences or heads that the float64 reference leaves out."""
    return name in TOKENWISE or (shape.B == 1 and name != "norm")


def _lkda(attention: str, around: str) -> Callable[[Inputs], Sequence[Tensor]]:
    """`attention` is the backend of `kda_attention_fused`, `around` that of the convolutions and of the norm."""

    def run(x: Inputs) -> Sequence[Tensor]:
        heads = x["q"].shape[2:]
        streams = [x[name].flatten(2) for name in "qkv"]
        filters = [x[f"{name}_conv"].view(-1, 1, WIDTH) for name in "qkv"]
        ys, _ = short_convolutions(streams, filters, normalized=(True, True, False), head_dim=heads[1], backend=around)
        q, k, v = (y.unflatten(2, heads) for y in ys)
        logits, gate = (x["gate_logits"], x["beta_logits"]), KDAGate(x["A_log"], x["dt_bias"].view(-1))
        o, state = kda_attention_fused(q, k, v, *logits, gate, normalized=True, backend=attention)
        return gated_rms_norm(o, x["output_gate"], x["norm"].view(-1), backend=around), state

    return run


def _fla() -> Mapping[str, Implementation]:
    """The functions that FLA's KimiDeltaAttention calls, with the same options."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.kda import chunk_kda

    def run(x: Inputs) -> Sequence[Tensor]:
        heads = x["q"].shape[2:]
        q, k, v = (
            causal_conv1d(x[name].flatten(2), x[f"{name}_conv"].view(-1, WIDTH), activation="silu")[0].unflatten(
                2, heads
            )
            for name in "qkv"
        )
        o, _ = chunk_kda(
            **{"q": q, "k": k, "v": v, "g": x["gate_logits"], "beta": x["beta_logits"]},
            **{"A_log": x["A_log"].view(-1), "dt_bias": x["dt_bias"].view(-1)},
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )
        return (rms_norm_gated(o, x["output_gate"], x["norm"].view(-1), None, activation="sigmoid", eps=1e-5),)

    return {"fla layer": Implementation(run, (*TOKENWISE, *PARAMETERS))}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    """The kernels around the core. The benchmark of kda reports those of the core."""
    if word != "cuda":
        return []
    names = ("forward",) if mode == "fwd" else ("forward", "backward")
    gates = ("kda_gate",) if mode == "fwd" else ("kda_gate", "kda_gate_backward")
    return [
        *(conv_kernel(name, shape.D, dtype, True) for name in names),
        *(norm_kernel(name, shape.D, dtype) for name in names),
        *(gate_kernel(name, shape.D, dtype, False) for name in gates),
    ]


BENCHMARK = OpBenchmark(
    op="kda_layer",
    gates=("slow", "fast"),
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={
        "cuda": Implementation(_lkda("cuda", "cuda"), (*TOKENWISE, *PARAMETERS)),
        "torch": Implementation(_lkda("cuda", "torch"), (*TOKENWISE, *PARAMETERS)),
        "chunk": Implementation(_lkda("chunk", "torch"), (*TOKENWISE, *PARAMETERS)),
    },
    peers={"fla": _fla},
    truth=_lkda("chunk", "torch"),
    kernels=kernels,
    has_reference=has_reference,
)
