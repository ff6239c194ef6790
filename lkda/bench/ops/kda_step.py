"""KDA's decoding step with its state in float32. Its time goes into reading and writing the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.ops import KDAGate, kda_step_fused
from lkda.ops.kda.cuda.step import step_kernel
from lkda.ops.kda.state import pack_state
from lkda.ops.runtime.jit import Kernel

WIDTH = 4
STREAMS = ("q", "k", "v")


def _inputs(kept: torch.dtype, shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v, logits [B, 1, H, D] and caches ~ N(0, 1); decays and filters as in a newly initialised layer."""
    B, H, D = shape.B, shape.H, shape.D
    sampled = {name: torch.randn(B, 1, H, D, dtype=dtype, device=device) for name in (*STREAMS, "gate_logits")}
    sampled["beta_logits"] = torch.randn(B, 1, H, dtype=dtype, device=device)
    sampled["A_log"] = torch.empty(H, device=device).uniform_(1, 16).log()
    sampled["dt_bias"] = torch.full((H * D,), -4.6, device=device)
    for name in STREAMS:
        sampled[f"{name}_conv"] = torch.rand(H * D, 1, WIDTH, device=device) - 0.5
        sampled[f"{name}_cache"] = torch.randn(B, WIDTH - 1, H * D, dtype=dtype, device=device)
    for i, part in enumerate(pack_state(torch.zeros(1, H, D, D, device=device), kept)):
        sampled[f"state{i}"] = part.new_zeros(B, *part.shape[1:])
    return sampled


def _moved_bytes(kept: torch.dtype, shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """The state, with its scales for int8, and the convolution caches are read and written.

    Besides, q, k, v and the logits of a token are read and o is written.
    """
    heads = shape.B * shape.H
    state = heads * (shape.D**2 * kept.itemsize + (4 * shape.D if kept == torch.int8 else 0))
    token = heads * shape.D * dtype.itemsize * 5
    caches = heads * shape.D * dtype.itemsize * 3 * (WIDTH - 1)
    return 2 * state + token + 2 * caches


def _lkda(backend: str, convolve: bool) -> Callable[[Inputs], Sequence[Tensor]]:
    def run(x: Inputs) -> Sequence[Tensor]:
        token: Any = {name: x[name].squeeze(1) for name in (*STREAMS, "gate_logits", "beta_logits")}
        state = tuple(x[name] for name in ("state0", "state1") if name in x)
        weights = [x[f"{name}_conv"] for name in STREAMS] if convolve else ()
        caches = [x[f"{name}_cache"] for name in STREAMS] if convolve else ()
        o = kda_step_fused(
            **token,
            gate=KDAGate(x["A_log"], x["dt_bias"]),
            state=state,
            weights=weights,
            caches=caches,
            backend=backend,
        )
        return (o.unsqueeze(1),)

    return run


def _fla() -> Mapping[str, Implementation]:
    """FLA's recurrent kernel, which includes the gate and the norm of q and k, with a float32 state.

    It has no convolution, and PyTorch computes beta.
    """
    from fla.ops.kda import fused_recurrent_kda

    def run(x: Inputs) -> Sequence[Tensor]:
        o, _ = fused_recurrent_kda(
            *(x[name] for name in STREAMS),
            g=x["gate_logits"],
            beta=torch.sigmoid(x["beta_logits"].float()),
            A_log=x["A_log"],
            dt_bias=x["dt_bias"],
            initial_state=x["state0"],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
        )
        return (o,)

    return {"fla fused_recurrent_kda": Implementation(run, comparable=False)}


def benchmark(op: str, kept: torch.dtype) -> OpBenchmark:
    """The benchmark of a step whose state is stored as `kept`.

    Every call changes the state, so errors are not measured here; the tests check them.
    """

    def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
        return [step_kernel(shape.D, dtype, kept)] if word.startswith("cuda") else []

    return OpBenchmark(
        op=op,
        gates=(None,),
        inputs=partial(_inputs, kept),
        moved_bytes=partial(_moved_bytes, kept),
        backends={
            "cuda": Implementation(_lkda("cuda", True), comparable=False),
            "cuda_core": Implementation(_lkda("cuda", False), comparable=False),  # without the convolutions
            "torch": Implementation(_lkda("torch", True), comparable=False),
        },
        peers={"fla": _fla} if kept == torch.float32 else {},
        truth=_lkda("torch", True),
        kernels=kernels,
    )


BENCHMARK = benchmark("kda_step", torch.float32)
