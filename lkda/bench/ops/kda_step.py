"""KDA's decoding step with its state in float32: all of the state moves, in and out, and little else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lkda.bench.contest import Contest, Entrant, Inputs, Shape
from lkda.ops import KDAGate, kda_step_fused
from lkda.ops.kda.cuda.step import step_kernel
from lkda.ops.kda.state import pack_state
from lkda.ops.runtime.jit import Kernel

WIDTH = 4
STREAMS = ("q", "k", "v")


def _inputs(kept: torch.dtype, shape: Shape, dtype: torch.dtype, device: torch.device, gate: str | None) -> Inputs:
    """q, k, v, logits ~ N(0, 1) [B, 1, H, D]; decays and filters as a fresh layer draws them; caches as the inputs."""
    B, H, D = shape.B, shape.H, shape.D
    drawn = {name: torch.randn(B, 1, H, D, dtype=dtype, device=device) for name in (*STREAMS, "gate_logits")}
    drawn["beta_logits"] = torch.randn(B, 1, H, dtype=dtype, device=device)
    drawn["A_log"] = torch.empty(H, device=device).uniform_(1, 16).log()
    drawn["dt_bias"] = torch.full((H * D,), -4.6, device=device)
    for name in STREAMS:
        drawn[f"{name}_conv"] = torch.rand(H * D, 1, WIDTH, device=device) - 0.5
        drawn[f"{name}_cache"] = torch.randn(B, WIDTH - 1, H * D, dtype=dtype, device=device)
    for i, part in enumerate(pack_state(torch.zeros(1, H, D, D, device=device), kept)):
        drawn[f"state{i}"] = part.new_zeros(B, *part.shape[1:])
    return drawn


def _moved_bytes(kept: torch.dtype, shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """The state in and out (int8's factors too), the token's q, k, v, logits and o, and the caches in and out."""
    heads = shape.B * shape.H
    state = heads * (shape.D**2 * kept.itemsize + (4 * shape.D if kept == torch.int8 else 0))
    token = heads * shape.D * dtype.itemsize * 5
    caches = heads * shape.D * dtype.itemsize * 3 * (WIDTH - 1)
    return 2 * state + token + 2 * caches


def _ours(backend: str, convolve: bool) -> Callable[[Inputs], Sequence[Tensor]]:
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


def _fla() -> Mapping[str, Entrant]:
    """Its recurrent kernel with gate and norm inside, its state in float32; no convolution, beta by PyTorch."""
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

    return {"fla fused_recurrent_kda": Entrant(run, comparable=False)}


def contest(op: str, kept: torch.dtype) -> Contest:
    """Of a state kept in a dtype. The state changes from call to call, so that errors are for the tests to tell."""

    def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
        return [step_kernel(shape.D, dtype, kept)] if word.startswith("cuda") else []

    return Contest(
        op=op,
        gates=(None,),
        inputs=partial(_inputs, kept),
        moved_bytes=partial(_moved_bytes, kept),
        backends={
            "cuda": Entrant(_ours("cuda", True), comparable=False),
            "cuda_core": Entrant(_ours("cuda", False), comparable=False),  # without the convolutions
            "torch": Entrant(_ours("torch", True), comparable=False),
        },
        peers={"fla": _fla} if kept == torch.float32 else {},
        truth=_ours("torch", True),
        kernels=kernels,
    )


CONTEST = contest("kda_step", torch.float32)
