"""KDA's forward in one kernel (chunk_fwd.cu, or chunk_fwd_pair.cu for heads of 128) beside the two that it replaces:
times, and how far the results differ.

    python -m lkda.bench.one_pass --out docs/results/kda_one_pass_NAME/table.json
    python -m lkda.bench.one_pass --out docs/results/NAME/table.json --backward

It needs a GPU of compute capability 9.0, because other GPUs do not have this kernel. Each shape is measured at slow
gates, as a newly initialised layer has them, and at fast ones, by calls of `kda_attention` without gradients. The times
are medians of replayed CUDA graphs: the two kernels (with the launch that finds the largest |v|), the one kernel, the
two again. "difference" is that of the results from those of the two kernels, |x - y| / |y|. "wrong" says what is not as
it must be: equal bits in a second run, and outputs that do not depend on later tokens.

With --backward the calls are of a forward and its backward, and the one kernel is the form of chunk_fwd_pair.cu that
saves. Then all results and gradients must have the bits of the two kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.bench.files import write_json
from lkda.bench.kda_inputs import GATES, NAMES, inputs
from lkda.bench.measure import header
from lkda.bench.op_benchmark import DTYPES, Inputs, Shape
from lkda.bench.timing import graph_of, steady_clock
from lkda.checks import InputError
from lkda.io import check_output_file
from lkda.ops import kda_attention
from lkda.ops.kda.cuda import core
from lkda.ops.kda.cuda.plan import plan_of

SHAPES = ("8x2048x16x64", "4x2048x32x64", "1x8192x128x64", "3x1000x44x64", "16x1024x32x64", "8x4096x12x64")
SHAPES_THAT_SAVE = ("1x8192x64x128", "8x2048x8x128")
LARGEST_DIFFERENCE = 5e-3


@contextmanager
def one_pass(runs: bool) -> Iterator[None]:
    """Whether chunk_fwd.cu and chunk_fwd_pair.cu run where the plan has them."""
    before = core.ONE_PASS, core.PAIR, core.PAIR_SAVES
    core.ONE_PASS = core.PAIR = core.PAIR_SAVES = runs
    try:
        yield
    finally:
        core.ONE_PASS, core.PAIR, core.PAIR_SAVES = before


def forward(drawn: Inputs) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return kda_attention(*(drawn[name] for name in NAMES), backend="cuda")


def forward_and_backward(drawn: Inputs) -> tuple[Tensor, ...]:
    """o, the final state, and the gradients of a loss that has v as the gradient of o."""
    leaves = [drawn[name].detach().requires_grad_() for name in NAMES]
    o, final_state = kda_attention(*leaves, backend="cuda")
    return o.detach(), final_state.detach(), *torch.autograd.grad(o, leaves, drawn["v"])


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def what_is_wrong(
    call: Callable[[Inputs], tuple[Tensor, ...]],
    drawn: Inputs,
    results: tuple[Tensor, ...],
    differences: list[float],
    largest: float,
) -> list[str]:
    found = []
    if not max(differences) <= largest:  # NaN is found too
        found.append(f"differs by {max(differences):.1e}")
    if not all(torch.equal(x, y) for x, y in zip(call(drawn), results, strict=True)):
        found.append("not deterministic")
    later = {name: drawn[name].clone() for name in NAMES}
    t = drawn["v"].shape[1] // 2 + 3
    for x in later.values():
        x[:, t:] = x[:, t:].flip(1)
    if not torch.equal(call(later)[0][:, :t], results[0][:, :t]):
        found.append("not causal")
    return found


def row(
    shape: Shape, gate: str, dtype: str, device: torch.device, milliseconds: float, backward: bool = False
) -> dict[str, Any]:
    """Raises: InputError if one kernel does not compute this shape."""
    torch.manual_seed(0)
    drawn = inputs(shape, DTYPES[dtype], device, gate)
    name = f"{shape.B} {shape.T} {shape.H} {shape.D}"
    plan = plan_of(drawn["v"], None)
    if (plan.chunk_fwd_saves if backward else plan.chunk_fwd) is None:
        raise InputError(
            f"--shapes: {name}: two kernels compute this shape on this GPU, see fills_in_one_pass in plan.py"
        )
    call = forward_and_backward if backward else forward
    times = {}
    for key, runs in (("two kernels", False), ("one kernel", True), ("two kernels, again", False)):
        with one_pass(runs):
            times[key] = steady_clock(graph_of(lambda: call(drawn)), device, milliseconds=milliseconds).median
    with one_pass(False):
        want = call(drawn)
    with one_pass(True):
        got = call(drawn)
        differences = [relative(x, y) for x, y in zip(got, want, strict=True)]
        wrong = what_is_wrong(call, drawn, got, differences, 0 if backward else LARGEST_DIFFERENCE)
    two = (times["two kernels"] + times["two kernels, again"]) / 2
    return {
        "B T H D": name,
        "gates": gate,
        **{key: f"{value:.4f}" for key, value in times.items()},
        "one / two": f"{times['one kernel'] / two:.2f}",
        "difference of o": f"{differences[0]:.1e}",
        "of the final state": f"{differences[1]:.1e}",
        **({"of the gradients": f"{max(differences[2:]):.1e}"} if backward else {}),
        "wrong": ", ".join(wrong),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, anew after each row")
    parser.add_argument("--shapes", nargs="+", help="B x T x H x D")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"), help="of q, k and v")
    parser.add_argument("--milliseconds", type=float, default=100, help="measuring time of each number")
    parser.add_argument("--backward", action="store_true", help="a forward and its backward, for heads of 128")
    options = parser.parse_args()
    try:
        default = SHAPES_THAT_SAVE if options.backward else SHAPES
        shapes = [Shape.parse(text) for text in options.shapes or default]
        if not torch.cuda.is_available():
            raise InputError("one_pass measures on a GPU, and torch sees no CUDA device.")
        check_output_file(options.out, option="--out")
        device = torch.device("cuda", 0)
        rows, about = list[dict[str, Any]](), header(device)
        note = f"{about['device']}, torch {about['torch']}, {options.dtype} with gates in float32; "
        note += "ms, medians of replayed graphs."
        for shape in shapes:
            for gate in GATES:
                rows.append(row(shape, gate, options.dtype, device, options.milliseconds, options.backward))
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items() if value), flush=True)
                write_json(options.out, {"kind": "table", "header": about, "rows": rows, "note": note})
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    return 1 if any(found["wrong"] for found in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
