"""How long the first forward and backward of each operator takes, with and without compiled kernels in the cache.

    python -m lkda.bench.first_use --out docs/results/first_use_h100/table.json

Each measurement is a process of its own. It first imports torch, uses the GPU, takes a gradient and makes the inputs.
Then it measures the import of lkda and the operator's first forward and backward. The gradient comes before because the
first `torch.autograd.grad` imports sympy, which takes seconds where its bytecode is not cached.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lkda.bench.files import write_json
from lkda.bench.measure import header

PROGRAM = """
import time, torch
x = torch.randn(64, 64, device="cuda", requires_grad=True)
y = x @ x
torch.autograd.grad(y, x, torch.ones_like(y))
torch.cuda.synchronize()
start = time.perf_counter()
from lkda.bench import ops
from lkda.bench.op_benchmark import Shape
benchmark = ops.find("{op}")
imported = time.perf_counter()
inputs = benchmark.inputs(Shape(1, 1000, 2, {head_dim}), torch.bfloat16, torch.device("cuda", 0), benchmark.gates[0])
leaves = [x.requires_grad_() for x in inputs.values()]
torch.cuda.synchronize()
begin = time.perf_counter()
o = benchmark.backends["cuda"].run(inputs)[0]
torch.autograd.grad(o, leaves, torch.ones_like(o))
torch.cuda.synchronize()
print(time.perf_counter() - begin + imported - start)
"""


def seconds(op: str, head_dim: int, cache: str) -> float:
    """The time that one process measured. Raises: RuntimeError with the end of its error output where it fails."""
    program = PROGRAM.format(op=op, head_dim=head_dim)
    environment = os.environ | {"LKDA_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{op}, heads of {head_dim}: {done.stderr.strip()[-500:]}")
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no CUDA device.")
    machine, rows = header(torch.device("cuda", 0)), list[dict[str, Any]]()
    what = "the import of lkda and the first forward and backward, 2 heads, 1000 tokens"
    note = f"{machine['device']}, torch {machine['torch']}; {what}."
    for op in ("simplified", "kda"):
        for head_dim in (64, 128):
            with tempfile.TemporaryDirectory() as cache:
                cold, warm = (seconds(op, head_dim, cache) for _ in range(2))
            rows.append({"op": op, "D": head_dim, "seconds_compiling": cold, "seconds_cached": warm})
            print(f"{op} {head_dim}: {cold:.2f} s with an empty cache, {warm:.2f} s with a full one", flush=True)
            write_json(options.out, {"kind": "table", "header": machine, "rows": rows, "note": note})


if __name__ == "__main__":
    main()
