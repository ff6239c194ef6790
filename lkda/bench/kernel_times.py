"""How long each kernel of KDA takes in a forward and backward. Needs a GPU.

    python -m lkda.bench.kernel_times --out docs/results/kda_kernels_NAME/table.json

Each shape is measured with slow gates, as a newly initialised layer has them, and with fast ones. A column named after
a kernel has its milliseconds in one forward and backward, by torch.profiler; where there are two passes over segments,
or a kernel runs in the forward and in the backward, it is their sum. "all kernels" is the sum of all, and "replayed" is
the time of the call as a CUDA graph, with the gaps between the kernels. Columns that begin with "forward" are of a
forward alone, without gradients, which one kernel computes at some shapes: chunk_fwd or chunk_fwd_pair. The latter
has a form for forwards that a backward follows too.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.bench.files import write_json
from lkda.bench.kda_inputs import GATES, NAMES, inputs
from lkda.bench.measure import header
from lkda.bench.op_benchmark import DTYPES, Shape
from lkda.bench.step_profile import events_of, profiler
from lkda.bench.timing import graph_of, steady_clock
from lkda.bench.two_trees import SHAPES
from lkda.checks import InputError
from lkda.io import check_output_file
from lkda.ops import kda_attention

KERNELS = ("intra_chunk_fwd", "amax", "inter_chunk_fwd", "segments", "inter_chunk_bwd", "intra_chunk_bwd")
ONE_PASS = ("chunk_fwd_pair", "chunk_fwd")
FORWARD = ("intra_chunk_fwd", "inter_chunk_fwd", *ONE_PASS)
CALLS = 20  # under the profiler


def kernel_ms(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel in one call: the mean of CALLS, with those that are not KDA's as "others"."""
    call()
    torch.cuda.synchronize(device)
    with profiler(device) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize(device)
    return by_kernel([(event.name, event.own) for event in events_of(profile, device)], calls=CALLS)


def by_kernel(events: list[tuple[str, float]], *, calls: int) -> dict[str, float]:
    """Milliseconds of each kernel in one call, from the names and microseconds of launches in `calls` calls."""
    found: dict[str, float] = defaultdict(float)
    known = (*KERNELS, *ONE_PASS)
    for name, microseconds in events:
        found[next((kernel for kernel in known if f"kda_{kernel}" in name), "others")] += microseconds / 1000 / calls
    return dict(found)


def row(shape: Shape, gate: str, leaves: list[Tensor], grad_o: Tensor, milliseconds: float) -> dict[str, Any]:
    """The row of one shape and gate, in ms."""
    device = grad_o.device

    def forward() -> object:
        with torch.no_grad():
            return kda_attention(*leaves, backend="cuda")

    def both() -> object:
        return torch.autograd.grad(kda_attention(*leaves, backend="cuda")[0], leaves, grad_o)

    kernels, alone = kernel_ms(both, device), kernel_ms(forward, device)
    replayed = [steady_clock(graph_of(call), device, milliseconds=milliseconds).median for call in (forward, both)]
    return {
        "B T H D": f"{shape.B} {shape.T} {shape.H} {shape.D}",
        "gates": gate,
        **{name: _ms(kernels.get(name)) for name in (*KERNELS, "chunk_fwd_pair", "others")},
        "all kernels": _ms(sum(kernels.values())),
        "replayed": _ms(replayed[1]),
        **{f"forward: {name}": _ms(alone.get(name)) for name in FORWARD},
        "forward: all kernels": _ms(sum(alone.values())),
        "forward: replayed": _ms(replayed[0]),
    }


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, anew after each shape")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T x H x D")
    parser.add_argument("--milliseconds", type=float, default=100, help="measuring time of each replayed graph")
    options = parser.parse_args()
    try:
        shapes = [Shape.parse(text) for text in options.shapes]
        if not torch.cuda.is_available():
            raise InputError("kernel_times measures on a GPU, and torch sees no CUDA device.")
        check_output_file(options.out, option="--out")
        device = torch.device("cuda")
        rows, about = [], header(device)
        for shape in shapes:
            for gate in GATES:
                torch.manual_seed(0)
                drawn = inputs(shape, DTYPES["bf16"], device, gate)
                leaves = [drawn[name].requires_grad_() for name in NAMES]
                rows.append(row(shape, gate, leaves, torch.randn_like(drawn["v"]), options.milliseconds))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items() if value), flush=True)
                note = f"{about['device']}, torch {about['torch']}, bf16 with gates in float32; ms of one forward and "
                note += "backward, or of one forward; kernels by the profiler, the others medians of replayed graphs."
                write_json(options.out, {"kind": "table", "header": about, "rows": rows, "note": note})
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
