"""What `recompute` of `kda_attention` saves between forward and backward, and how much longer a step takes with it.

    python -m lkda.bench.recompute --out docs/results/kda_recompute_NAME/table.json

Each shape is measured with `recompute` and without. "kept" are the bytes that stay allocated between forward and
backward per token and head, beyond the inputs, o and the final state; "peak" is the largest memory in forward and
backward, beyond the inputs. The times are of forward and backward. It also compares the bits of all results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.bench.files import write_json
from lkda.bench.kda_inputs import NAMES, inputs
from lkda.bench.measure import header
from lkda.bench.op_benchmark import DTYPES, Shape
from lkda.bench.timing import graph_of, requested_bytes, steady_clock
from lkda.checks import InputError
from lkda.ops import kda_attention

SHAPES = ("8x2048x16x64", "8x2048x8x128", "1x8192x64x128")


def row(
    shape: Shape, dtype: str, leaves: list[Tensor], grad_o: Tensor, recompute: bool, milliseconds: float
) -> tuple[dict[str, Any], list[Tensor]]:
    """The measurements of one shape, and its results: o and the gradients."""
    device, tokens_and_heads = grad_o.device, shape.elements // shape.D

    def forward() -> tuple[Tensor, Tensor]:
        return kda_attention(*leaves, backend="cuda", recompute=recompute)

    def both() -> list[Tensor]:
        o, _ = forward()
        return [o.detach(), *torch.autograd.grad(o, leaves, grad_o)]

    results = both()
    torch.cuda.synchronize(device)
    before, requested_before = torch.cuda.memory_allocated(device), requested_bytes(device)
    outputs = forward()
    kept = requested_bytes(device) - requested_before - sum(x.nbytes for x in outputs)
    del outputs
    torch.cuda.reset_peak_memory_stats(device)
    both()
    peak = torch.cuda.max_memory_allocated(device) - before
    replayed = steady_clock(graph_of(both), device, milliseconds=milliseconds)
    eager = steady_clock(both, device, milliseconds=milliseconds)
    return {
        "B T H D": f"{shape.B} {shape.T} {shape.H} {shape.D}",
        "dtype": dtype,
        "recompute": recompute,
        "kept, bytes per token and head": round(kept / tokens_and_heads, 1),
        "peak MiB": round(peak / 2**20, 1),
        "replayed ms": round(replayed.median, 4),
        "replayed p20": round(replayed.p20, 4),
        "replayed p80": round(replayed.p80, 4),
        "eager ms": round(eager.median, 4),
    }, results


def measure(shape: Shape, dtype: str, device: torch.device, milliseconds: float) -> list[dict[str, Any]]:
    """Rows without and with `recompute`, at slow gates. `same bits` says whether all results are equal."""
    torch.manual_seed(0)
    drawn = inputs(shape, DTYPES[dtype], device, "slow")
    leaves = [drawn[name].requires_grad_() for name in NAMES]
    grad_o = torch.randn_like(drawn["v"])
    kept, want = row(shape, dtype, leaves, grad_o, False, milliseconds)
    again, got = row(shape, dtype, leaves, grad_o, True, milliseconds)
    same = all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    return [kept | {"same bits": ""}, again | {"same bits": same}]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T x H x D")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES, help="of q, k and v")
    parser.add_argument("--milliseconds", type=float, default=300, help="measuring time of each number")
    options = parser.parse_args()
    try:
        shapes = [Shape.parse(text) for text in options.shapes]
    except InputError as error:
        raise SystemExit(f"error: --shapes: {error}") from None
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device.")
    machine, rows = header(torch.device("cuda", 0)), list[dict[str, Any]]()
    note = f"{machine['device']}, torch {machine['torch']}; slow gates; forward and backward in ms, medians."
    for shape in shapes:
        for dtype in options.dtypes:
            rows += measure(shape, dtype, torch.device("cuda", 0), options.milliseconds)
            for found in rows[-2:]:
                print(", ".join(f"{name} {x}" for name, x in found.items() if x != ""), flush=True)
            write_json(options.out, {"kind": "table", "header": machine, "rows": rows, "note": note})
    return 0 if all(found["same bits"] in ("", True) for found in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
