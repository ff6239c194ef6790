"""The core operator of Kimi Delta Attention. Its inputs are normalised q and k and activated g and beta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lkda.bench.kda_inputs import GATES, NAMES, inputs
from lkda.bench.op_benchmark import Implementation, Inputs, OpBenchmark, Shape
from lkda.checks import InputError
from lkda.ops import kda_attention, softmax_attention
from lkda.ops.kda.cuda import core
from lkda.ops.kda.cuda import recurrent as cuda_recurrent
from lkda.ops.kda.cuda import variants as cuda_kernels
from lkda.ops.kda.cuda.plan import fills_in_one_pass
from lkda.ops.runtime.jit import Kernel
from lkda.ops.runtime.kernel_inputs import ELEMENTS

LONGEST_SOFTMAX = 2**15  # a longer call takes about a second


def moved_bytes(shape: Shape, dtype: torch.dtype, mode: str) -> int:
    """Forward reads q, k, v, g, beta and writes o. Backward reads those and do and writes their gradients.

    g and beta are float32.
    """
    wide = shape.elements * dtype.itemsize
    gates = 4 * shape.elements + 4 * shape.elements // shape.D
    forward, backward = 4 * wide + gates, 7 * wide + 2 * gates
    return forward if mode == "fwd" else forward + backward


def _lkda(backend: str) -> Callable[[Inputs], Sequence[Tensor]]:
    return lambda inputs: kda_attention(*(inputs[name] for name in NAMES), backend=backend)


def _fla() -> Mapping[str, Implementation]:
    from fla.ops.kda import chunk_kda

    return {"fla chunk_kda": Implementation(lambda inputs: chunk_kda(**inputs, output_final_state=True), NAMES)}


def _cudnn() -> Mapping[str, Implementation]:
    """It supports a head size of 128 only, and takes all sequences packed into one row."""
    from cudnn.linear_attention import kimi_delta_attention

    def adapt(inputs: Inputs) -> Inputs:
        B, T = inputs["q"].shape[:2]
        bounds = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=inputs["q"].device)
        return {**inputs, "cu_seqlens": bounds}

    def run(inputs: Inputs) -> Sequence[Tensor]:
        found = kimi_delta_attention(**{n: x.flatten(0, 1) if n in NAMES else x for n, x in inputs.items()})
        o = found[0] if isinstance(found, tuple) else found
        return (o.view_as(inputs["v"]),)

    return {"cudnn kimi_delta_attention": Implementation(run, NAMES, adapt)}


def _sdpa() -> Mapping[str, Implementation]:
    """Causal softmax attention on q, k, v: another function, whose time is compared with KDA's."""

    def adapt(inputs: Inputs) -> Inputs:
        return {name: inputs[name] for name in ("q", "k", "v")}

    def run(inputs: Inputs) -> Sequence[Tensor]:
        if inputs["q"].shape[1] > LONGEST_SOFTMAX:
            raise InputError(f"not timed beyond T = {LONGEST_SOFTMAX}: its time is quadratic in T")
        return (softmax_attention(inputs["q"], inputs["k"], inputs["v"], backend="sdpa"),)

    return {"softmax attention (SDPA)": Implementation(run, ("q", "k", "v"), adapt, comparable=False)}


def kernels(word: str, mode: str, shape: Shape, dtype: torch.dtype, arch: str) -> list[Kernel]:
    listed = {"cuda": cuda_kernels.kernels, "cuda_recurrent": cuda_recurrent.kernels}.get(word)
    if listed is None:
        return []
    variant = {f"HEAD_DIM={shape.D}", f"ELEMENT={ELEMENTS[dtype]}"}
    found = [kernel for kernel in listed(arch) if variant <= set(kernel.module.defines)]
    one_pass = {kernel.entry for kernel in found if kernel.entry.startswith("kda_chunk_fwd")}
    that_save = {entry for entry in one_pass if entry.endswith("_saves")}
    entries = {kernel.entry for kernel in found} - one_pass
    two_kernels = {"kda_intra_chunk_fwd", "kda_inter_chunk_fwd"}
    blocks = shape.B * shape.H * cuda_kernels.chunk_fwd(shape.D, dtype).blocks if one_pass else 0
    if mode == "fwd":
        entries &= two_kernels | {"kda_recurrent"}
        if one_pass and core.runs_in_one_kernel(shape.D) and fills_in_one_pass(blocks):
            entries = one_pass - that_save
    elif that_save and core.PAIR_SAVES and fills_in_one_pass(blocks, saves=True):
        entries = entries - two_kernels | that_save
    return [kernel for kernel in found if kernel.entry in entries]


BENCHMARK = OpBenchmark(
    op="kda",
    gates=GATES,
    inputs=inputs,
    moved_bytes=moved_bytes,
    backends={
        "cuda": Implementation(_lkda("cuda"), NAMES),
        "cuda_recurrent": Implementation(_lkda("cuda_recurrent")),
        "cpu": Implementation(_lkda("cpu"), NAMES),
        "chunk": Implementation(_lkda("chunk"), NAMES),
        "recurrent": Implementation(_lkda("recurrent"), NAMES),
    },
    peers={"fla": _fla, "cudnn": _cudnn, "sdpa": _sdpa},
    truth=_lkda("chunk"),
    kernels=kernels,
)
