"""Small calls that together launch every CUDA kernel of KDA and of its layer, for `lkda.bench.sanitize`.

    python -m lkda.bench.sanitized_cases chunked-64-bf16-whole layer-64-bf16

It runs the named cases, or all of them, on the first GPU. For each it writes a line of JSON when it begins and one when
it is done, with its seconds and the kernels that it launched. The results are not compared with anything: the tests do
that.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lkda.bench.kda_inputs import NAMES, inputs
from lkda.bench.op_benchmark import DTYPES, Shape
from lkda.ops import KDAGate
from lkda.ops.kda.cuda import recurrent, variants
from lkda.ops.kda.cuda.core import kda_cuda, launch_and_save
from lkda.ops.kda.cuda.layer import kda_layer_cuda
from lkda.ops.kda.cuda.plan import plan_of
from lkda.ops.kda.cuda.step import STATES, kda_step_cuda
from lkda.ops.kda.state import pack_state
from lkda.ops.runtime.jit import Kernel, Module

Case = Callable[[torch.device], None]
HEAD_DIMS = (64, 128)
PACKED = (0, 0, 5, 69, 169, 169, 300)  # two empty sequences, and lengths that are no multiples of a chunk
LONG_PACKED = (0, 0, 2100)
WIDTH = 4
PLANTED_FAULT = "planted-fault"


def chunked(
    shape: Shape,
    dtype: torch.dtype,
    gate: str,
    device: torch.device,
    *,
    bounds: tuple[int, ...] | None = None,
    normalize: bool = False,
    recompute: bool = False,
) -> None:
    """Forward and backward of the chunked kernels from an initial state, of which there is a gradient too, and a
    forward that saves nothing."""
    drawn = inputs(shape, dtype, device, gate)
    q, k, v, g, beta = leaves = [drawn[name].requires_grad_() for name in NAMES]
    sequences = shape.B if bounds is None else len(bounds) - 1
    state = torch.randn(sequences, shape.H, shape.D, shape.D, device=device, requires_grad=True)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=device)
    options = {"normalize": normalize, "recompute": recompute}
    call = partial(kda_cuda, q, k, v, g, beta, shape.D**-0.5, state, cu_seqlens, **options)
    o, final = call()
    torch.autograd.grad((o, final), [*leaves, state], (torch.randn_like(o), torch.randn_like(final)))
    with torch.no_grad():
        call()


def at_both_gates(shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Chunks that forget the state before them take another way through the kernels of segments."""
    for gate in ("slow", "fast"):
        chunked(shape, dtype, gate, device)


def one_pass(D: int, dtype: torch.dtype, query: torch.dtype | None, device: torch.device) -> None:
    """The forward in one kernel, launched as for a larger batch. Seven chunks, the last one shorter."""
    B, T, H = 1, 410, 2
    drawn = inputs(Shape(B, T, H, D), dtype, device, "slow")
    q, k = (drawn[name].to(query or dtype) for name in ("q", "k"))
    v, g, beta = (drawn[name] for name in ("v", "g", "beta"))
    o, final_state = torch.empty_like(v), torch.empty(B, H, D, D, device=device)
    one = variants.chunk_fwd(D, dtype, query)
    for state in (None, torch.randn(B, H, D, D, device=device)):
        given = (q, k, v, g, beta, state, o, final_state)
        one.kernel((B * H * one.blocks, 1, 1), one.threads, *given, T, H, D**-0.5, device=device)


def one_pass_that_saves(dtype: torch.dtype, query: torch.dtype | None, device: torch.device) -> None:
    """The same for a forward that a backward follows, for heads of 128: with and without workspaces."""
    B, T, H, D = 1, 410, 2, 128
    drawn = inputs(Shape(B, T, H, D), dtype, device, "slow")
    q, k = (drawn[name].to(query or dtype) for name in ("q", "k"))
    v, g, beta = (drawn[name] for name in ("v", "g", "beta"))
    one, plan = variants.chunk_fwd(D, dtype, query, saves=True), plan_of(v, None, q.dtype)
    launch = partial(one.kernel, (B * H * one.blocks, 1, 1), one.threads, device=device)
    for state, recompute in ((None, True), (torch.randn(B, H, D, D, device=device), False)):
        launch_and_save(q, k, v, g, beta, state, plan, launch, D**-0.5, recompute)


def recurrence(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """The kernel that goes token by token, for packed sequences."""
    drawn = inputs(Shape(1, PACKED[-1], 2, D), dtype, device, "slow")
    q, k, v, g, beta = (drawn[name] for name in NAMES)
    state = torch.randn(len(PACKED) - 1, 2, D, D, device=device)
    bounds = torch.tensor(PACKED, dtype=torch.int32, device=device)
    recurrent.forward(q, k, v, g, beta, state, bounds, D**-0.5)


def gate_of(H: int, D: int, device: torch.device) -> KDAGate:
    return KDAGate(torch.zeros(H, device=device), torch.full((H * D,), -3.0, device=device))


def step(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """A decoding step, with the short convolutions, for each dtype of the state."""
    B, H = 3, 2

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    for state_dtype in STATES:
        state, *factors = pack_state(normal(B, H, D, D, dtype=torch.float32), state_dtype)
        q, k, v, gate_logits = (normal(B, H, D) for _ in range(4))
        kda_step_cuda(
            q,
            k,
            v,
            gate_logits,
            normal(B, H),
            gate_of(H, D, device),
            state.contiguous(),
            factors[0].contiguous() if factors else None,
            weights=[normal(H * D, 1, WIDTH, dtype=torch.float32) for _ in range(3)],
            caches=[normal(B, WIDTH - 1, H * D, dtype=torch.float32) for _ in range(3)],
            normalize=True,
            scale=D**-0.5,
        )


@contextmanager
def products_in_float32(device: torch.device) -> Iterator[None]:
    """Matrix products are computed in float32 and rounded. Those of cuBLAS in half precision make racecheck fail before
    it checks anything. They are replaced below the dispatcher, because a layer makes them inside of its operator."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a[None].float(), b[None].float())[0].to(a.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm", product, device.type.upper())
    try:
        yield
    finally:
        library._destroy()


def layer(D: int, dtype: torch.dtype, device: torch.device) -> None:
    """Forward and backward of a layer between its projections: convolutions, gate, core and gated norm."""
    with products_in_float32(device):
        _layer(D, dtype, device)


def _layer(D: int, dtype: torch.dtype, device: torch.device) -> None:
    H, R, bounds = 2, 16, torch.tensor(PACKED, dtype=torch.int32, device=device)

    def leaf(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device).requires_grad_()

    gate = gate_of(H, D, device)
    assert gate.A_log is not None
    assert gate.dt_bias is not None
    for cu_seqlens in (None, bounds):
        x, filters = leaf(1, PACKED[-1], 3 * H * D), [leaf(H * D, 1, WIDTH, dtype=torch.float32) for _ in range(3)]
        latent, weight, beta_logits = leaf(1, PACKED[-1], R), leaf(H * D, R), leaf(1, PACKED[-1], H)
        out_latent, out_weight, norm = leaf(1, PACKED[-1], R), leaf(H * D, R), leaf(D, dtype=torch.float32)
        parameters = [gate.A_log.requires_grad_(), gate.dt_bias.requires_grad_()]
        y, final_state, lasts = kda_layer_cuda(
            x,
            filters,
            latent,
            weight,
            beta_logits,
            gate,
            out_latent,
            out_weight,
            norm,
            head_dim=D,
            cu_seqlens=cu_seqlens,
        )
        results = [y, final_state, *lasts]
        leaves = [x, *filters, latent, weight, beta_logits, out_latent, out_weight, norm, *parameters]
        torch.autograd.grad(results, leaves, [torch.randn_like(result) for result in results])


def planted_fault(device: torch.device) -> None:
    """A kernel with a race and an access beyond the end of a tensor, which the tools must find."""
    kernel = Module(Path(__file__).with_name("planted_fault.cu"), {}).kernel("kda_planted_fault", "P")
    kernel((1, 1, 1), 64, torch.zeros(63, device=device), device=device)


def cases() -> dict[str, Case]:
    """Name -> case. The shapes are the smallest that take each way through the host's code; see segments.py."""
    found: dict[str, Case] = {}
    for D in HEAD_DIMS:
        for word, dtype in DTYPES.items():
            name, chunk = f"chunked-{D}-{word}", 32 if word == "fp32" else 64
            found[f"{name}-whole"] = partial(chunked, Shape(2, 200, 2, D), dtype, "slow")
            found[f"{name}-segments"] = partial(at_both_gates, Shape(1, 16 * chunk + 6, 2, D), dtype)
            packed = partial(chunked, Shape(1, PACKED[-1], 2, D), dtype, "slow", bounds=PACKED)
            found[f"{name}-packed"] = partial(packed, normalize=True, recompute=True)
            found[f"recurrent-{D}-{word}"] = partial(recurrence, D, dtype)
            found[f"step-{D}-{word}"] = partial(step, D, dtype)
            found[f"layer-{D}-{word}"] = partial(layer, D, dtype)
        long = Shape(1, LONG_PACKED[-1], 2, D)
        found[f"chunked-{D}-bf16-packed-segments"] = partial(chunked, long, torch.bfloat16, "slow", bounds=LONG_PACKED)
    for word in ("bf16", "fp16"):
        many = Shape(1, 1030, 34, 64)  # so many heads that segments are worth it only where chunks forget
        found[f"chunked-64-{word}-optional-segments"] = partial(at_both_gates, many, DTYPES[word])
    for dtype, query in variants.CHUNK_FWD_DTYPES:
        words = {known: word for word, known in DTYPES.items()}
        word = words[dtype] + (f"-{words[query]}" if query else "")
        for D in HEAD_DIMS:
            found[f"one-pass-{D}-{word}"] = partial(one_pass, D, dtype, query)
        found[f"one-pass-128-saves-{word}"] = partial(one_pass_that_saves, dtype, query)
    return found


def launched(case: Case, device: torch.device) -> list[str]:
    """Runs a case. Returns the kernels that it launched: their entry, with their macros."""
    kernels: dict[str, None] = {}
    launch = Kernel.__call__

    def recording(kernel: Kernel, grid: tuple[int, int, int], block: int, *arguments, device: torch.device) -> None:
        kernels[f"{kernel.entry} {kernel.module.source.name} {' '.join(kernel.module.defines)}"] = None
        launch(kernel, grid, block, *arguments, device=device)

    Kernel.__call__ = recording  # type: ignore[assignment, method-assign]
    try:
        case(device)
    finally:
        Kernel.__call__ = launch  # type: ignore[method-assign]
    return list(kernels)


def run(names: list[str], device: torch.device) -> Iterator[dict[str, object]]:
    """Two records for each named case: when it begins, and when it is done."""
    every = cases() | {PLANTED_FAULT: planted_fault}
    for name in names or cases():
        yield {"case": name}
        torch.manual_seed(0)
        start = time.perf_counter()
        kernels = launched(every[name], device)
        torch.cuda.synchronize(device)
        yield {"case": name, "seconds": round(time.perf_counter() - start, 2), "kernels": kernels}


if __name__ == "__main__":
    for record in run(sys.argv[1:], torch.device("cuda", 0)):
        print(json.dumps(record), flush=True)
