"""The table of the notes that the project began with, measured: operators by the length of the sequence and by the size
of a head, and the ablations. All are measured forward, in bf16; KDA's decays are slow, as in a newly initialised layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lkda.bench import measure
from lkda.bench.measure import Case
from lkda.bench.notes.ablations import Ablation, ablations
from lkda.bench.op_benchmark import Implementation, OpBenchmark, Shape
from lkda.bench.ops import find
from lkda.bench.timing import Timing, graph_of, once, product_tflops, steady_clock
from lkda.ops.runtime.jit import architecture, multiprocessors

Row = dict[str, Any]
DTYPE = "bf16"
LENGTHS = tuple(Shape(1, T, 16, 64) for T in (1024, 4096, 8192, 32_768, 131_072))
HEAD_SIZES = tuple(Shape(8, 8192, 16, D) for D in (32, 64, 128))
LONG = 250  # ms; a call that takes longer is timed once
LONGEST_TRUTH = 8192  # tokens; the float64 truth of softmax attention takes memory that is quadratic in them
COMPILED = 8192  # tokens; for longer sequences the kernels are compiled already, and a call may take seconds
CHUNK = 64  # tokens, of KDA's chunked kernels
# What decoding keeps of a sequence after T tokens: the float32 state, or the keys and values in bf16.
STATE_BYTES: Mapping[str, Callable[[Shape], int]] = {
    "simplified": lambda shape: 4 * shape.H * 2 * shape.D,
    "kda": lambda shape: 4 * shape.H * shape.D**2,
    "softmax": lambda shape: 2 * 2 * shape.T * shape.H * shape.D,
}


@dataclass(frozen=True)
class Subject:
    """An implementation of the table.

    Args:
        op, backend: as in `lkda.bench.ops`.
        complexity: how the operations of a head grow with T, D and the chunk C.
        operations: shape -> floating-point operations of the algorithm. A multiplication and an addition are two.
        least_operations: those of the cheapest algorithm for matrix units, which count for the lower bound.
    """

    name: str
    op: str
    backend: str
    complexity: str
    operations: Callable[[Shape], float]
    least_operations: Callable[[Shape], float]


def _elementwise(shape: Shape) -> float:
    """Per channel: a sigmoid (4), num (3), den (2), and q num / (den + 1e-30) (3)."""
    return 12 * shape.elements


def _recurrent(shape: Shape) -> float:
    """Per entry of the state: its decay (1), the read for the key (2), the write (2) and the read for the query (2)."""
    return 7 * shape.elements * shape.D


def _chunked(shape: Shape) -> float:
    """The products of the chunked form, per token: three with the state, four with half a chunk on average, and the
    triangular inverse."""
    return shape.elements / shape.D * (6 * shape.D**2 + 4 * CHUNK * shape.D + CHUNK**2 / 3)


def _quadratic(shape: Shape) -> float:
    """Two products of D for each pair of a query and a key that it sees."""
    return 4 * shape.D * shape.B * shape.H * shape.T * (shape.T + 1) / 2


SUBJECTS = (
    Subject("simplified, baseline", "simplified", "cuda_baseline", "T D", _elementwise, lambda shape: 0),
    Subject("simplified, tuned", "simplified", "cuda", "T D", _elementwise, lambda shape: 0),
    Subject("KDA, recurrent", "kda", "cuda_recurrent", "T D^2", _recurrent, _chunked),
    Subject("KDA, chunked", "kda", "cuda", "T (D^2 + C D)", _chunked, _chunked),
    Subject("softmax, naive", "softmax", "cuda_naive", "T^2 D", _quadratic, _quadratic),
    Subject("softmax, fused", "softmax", "sdpa", "T^2 D", _quadratic, _quadratic),
)


def header(device: torch.device) -> Row:
    """As that of `lkda.bench.measure`, with the speed of a matrix product and the number of multiprocessors."""
    return {
        **measure.header(device),
        "product_tflops": product_tflops(device),
        "multiprocessors": multiprocessors(device),
    }


def count(device: torch.device) -> int:
    """How many rows `rows` yields."""
    return len(SUBJECTS) * len(LENGTHS + HEAD_SIZES) + len(ablations(device))


def rows(device: torch.device, speeds: Mapping[str, Any], *, milliseconds: float) -> Iterator[Row]:
    """Yields the rows: those of the lengths, of the head sizes, and of the ablations (`part`).

    Args:
        speeds: the header, with copy_gb_per_s and product_tflops.
        milliseconds: that each row is measured for.
    """
    for part, shapes in (("length", LENGTHS), ("head size", HEAD_SIZES)):
        for shape in shapes:
            for subject in SUBJECTS:
                yield {"part": part} | _subject_row(subject, shape, device, speeds, milliseconds)
    for ablation, shape in ablations(device):
        yield {"part": "ablation"} | _ablation_row(ablation, shape, device, milliseconds)


def _subject_row(
    subject: Subject, shape: Shape, device: torch.device, speeds: Mapping[str, Any], milliseconds: float
) -> Row:
    benchmark = find(subject.op)
    row = _measured(benchmark, subject.backend, benchmark.backends[subject.backend], shape, device, milliseconds)
    memory_ms = row["bytes"] / speeds["copy_gb_per_s"] / 1e6
    compute_ms = subject.least_operations(shape) / speeds["product_tflops"] / 1e9
    bound = max(memory_ms, compute_ms)
    return {
        "name": subject.name,
        **row,
        "complexity": subject.complexity,
        "operations": subject.operations(shape),
        "state_bytes": STATE_BYTES[subject.op](shape),
        "lower_bound_ms": bound,
        "bound_by": "memory" if memory_ms >= compute_ms else "matrix products",
        "fraction_of_lower_bound": bound / row["ms_median"],
        **measure.resources(_case(benchmark, subject.backend, shape), device),
    }


def _ablation_row(ablation: Ablation, shape: Shape, device: torch.device, milliseconds: float) -> Row:
    row = _measured(find(ablation.op), ablation.option, ablation.implementation, shape, device, milliseconds)
    kernel, blocks = ablation.kernel, ablation.blocks(shape)
    used = kernel.module.binary(architecture(device)).resources()[kernel.entry]
    resident = kernel.resident_blocks(ablation.threads, device)
    most = torch.cuda.get_device_properties(device).max_threads_per_multi_processor
    return {
        "name": ablation.option,
        **row,
        "registers": used.registers,
        "spill_bytes": used.spill_bytes,
        "shared_bytes": kernel.shared_bytes + used.static_shared_bytes,
        "threads": ablation.threads,
        "blocks": blocks,
        "resident_blocks": resident,
        # Of the threads that a multiprocessor can hold: those that fit, and those that the launch has.
        "occupancy_limit": resident * ablation.threads / most,
        "occupancy": min(resident, blocks / multiprocessors(device)) * ablation.threads / most,
    }


def _case(benchmark: OpBenchmark, name: str, shape: Shape) -> Case:
    return Case(benchmark, shape, DTYPE, benchmark.gates[0], name, None, "fwd", "graph")


def _measured(
    benchmark: OpBenchmark,
    name: str,
    implementation: Implementation,
    shape: Shape,
    device: torch.device,
    milliseconds: float,
) -> Row:
    """Time of the device, bytes, memory and error of one implementation."""
    torch.manual_seed(0)
    case = _case(benchmark, name, shape)
    inputs = benchmark.inputs(shape, torch.bfloat16, device, case.gate)
    call, outputs, peak = measure.prepare(implementation, inputs, case, device, compiled=shape.T > COMPILED)
    single = once(call)
    long = Timing(single, single, single)
    timing = long if single > LONG else steady_clock(graph_of(call), device, milliseconds=milliseconds)
    exact = benchmark.op != "softmax" or shape.T <= LONGEST_TRUTH
    moved = benchmark.moved_bytes(shape, torch.bfloat16, "fwd")
    return {
        **{"op": benchmark.op, "B": shape.B, "T": shape.T, "H": shape.H, "D": shape.D, "dtype": DTYPE},
        **{"ms_median": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "noisy": timing.is_noisy},
        **{"bytes": moved, "gb_per_s": moved / timing.median / 1e6, "peak_mib": peak},
        "error": measure.errors(case, implementation, inputs, outputs)["o"] if exact else None,
    }
