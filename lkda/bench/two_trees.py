"""Times KDA in two checkouts of this repository, in turns on one device: before and after a change of the kernels.

    python -m lkda.bench.two_trees PATH . --out docs/results/kda_before_after_NAME/table.json

PATH is the checkout of before, `.` the one of now. Each is measured in a process of its own with its own `lkda`, in the
order before, now, before, now, so that what the device does meanwhile affects both. The inputs and the clock are those
of the tree that the command is called from. Each shape is measured with slow gates, as a newly initialised layer has
them, and with fast ones: forward, and forward and backward, as replayed CUDA graphs and as eager calls, and the bytes
kept between forward and backward. The JSON is a table of means over the processes, and has every measurement in `runs`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lkda.bench.files import write_json
from lkda.bench.op_benchmark import Shape
from lkda.checks import InputError, check_count
from lkda.io import check_output_file

SHAPES = (
    *("8x2048x16x64", "4x4096x12x64", "1x8192x8x64", "8x2048x8x128", "1x8192x16x128", "1x4096x32x128"),
    *("2x16384x8x128", "1x8192x64x128", "1x65536x4x128", "3x1000x5x128"),
)
# Columns of the table, and what they show of a measurement.
COLUMNS = {
    "forward": "fwd replayed",
    "forward + backward": "fwd+bwd replayed",
    "eager: forward": "fwd eager",
    "eager: forward + backward": "fwd+bwd eager",
}
WORKER = Path(__file__).with_name("tree_times.py")

Run = dict[str, Any]  # what one process measured: {"device", "torch", "rows": [one for each shape and gate]}


def commit(tree: Path) -> str | None:
    """The commit of a checkout, with `+changes` if there are uncommitted ones; None if it is no checkout of git."""
    if not (tree / ".git").exists():  # git would name the commit of a repository around it
        return None
    words = ["git", "-C", str(tree), "describe", "--always", "--exclude=*", "--dirty=+changes"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


def lines_of(tree: Path, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process writes that measures `tree`, a record at a time. Raises: InputError if it fails."""
    # -P: the folder of the program is not searched for modules.
    words = [sys.executable, "-P", str(WORKER), *arguments]
    paths = os.pathsep.join([str(tree.resolve()), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # torch would load the integrations of an installed lkda, which a tree that is older may lack.
    environment = os.environ | {"PYTHONPATH": paths, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    with subprocess.Popen(words, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield from (json.loads(line) for line in process.stdout if line.startswith('{"'))
        except BaseException:  # also where the caller reads no further
            process.terminate()
            raise
    if process.returncode:
        raise InputError(f"the process that measures {tree} ended with {process.returncode}; it wrote why above.")


def measure(name: str, tree: Path, arguments: Sequence[str]) -> Run:
    """All measurements of one process. Raises: InputError if it fails, or if its lkda is not that of the tree."""
    begun, run = time.perf_counter(), Run(rows=[])
    for record in lines_of(tree, arguments):
        if "lkda" in record:
            if not Path(record["lkda"]).resolve().is_relative_to(tree.resolve()):
                raise InputError(f"the process that measures {tree} imports another lkda, {record['lkda']}.")
            run = {"device": record["device"], "torch": record["torch"], **run}
        else:
            run["rows"].append(record)
            times = ", ".join(f"{mode} {record[key][0]:.3f}" for mode, key in COLUMNS.items() if key in record)
            print(f"{name}: {record['shape']} {record['gate']}: {times} ms", flush=True)
    print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    return run


def table(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, str]]:
    """A row for each shape and gate. A cell is "before -> now", each the mean over the processes."""
    rows = []
    for line, first in enumerate(next(iter(runs.values()))[0]["rows"]):
        B, T, H, D = map(int, first["shape"].split("x"))
        measured = [[run["rows"][line] for run in found] for found in runs.values()]
        row = {"B T H D": f"{B} {T} {H} {D}", "gates": first["gate"]}
        for name, key in COLUMNS.items():
            row[name] = _cell([[x[key][0] for x in found if key in x] for found in measured], 3)
        kept = [[x["kept_bytes"] for x in found if x["kept_bytes"] is not None] for found in measured]
        row["kept, bytes per token and head"] = _cell([[x / (B * T * H) for x in found] for found in kept], 0)
        rows.append(row)
    return rows


def _cell(numbers: Sequence[Sequence[float]], digits: int) -> str:
    """Empty where nothing was measured, as on a CPU."""
    return " -> ".join(f"{statistics.mean(x):,.{digits}f}" for x in numbers) if all(numbers) else ""


def note(runs: Mapping[str, Sequence[Run]], commits: Mapping[str, str | None], date: str) -> str:
    one = runs["now"][0]
    return (
        f"{one['device']}, torch {one['torch']}, bf16 with gates in float32; before -> now; ms, replayed graphs unless "
        f"said, the mean of the medians of {len(runs['now'])} processes each, in turns on one device. Before: commit "
        f"{commits['before'] or 'unknown'}, now: commit {commits['now'] or 'unknown'}; {date}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the root of a checkout")
    parser.add_argument("now", type=Path, help="the root of another one")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, anew after each round")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T x H x D")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each tree")
    parser.add_argument("--backend", default="cuda", choices=["cuda", "chunk"], help="chunk: eager, on the CPU")
    parser.add_argument("--milliseconds", type=float, default=100, help="measuring time of each number")
    options = parser.parse_args()
    trees = {"before": options.before, "now": options.now}
    runs: dict[str, list[Run]] = {name: [] for name in trees}
    try:
        shapes = [str(Shape.parse(text)) for text in options.shapes]
        check_count("--rounds", options.rounds, least=1)
        if options.backend == "cuda" and not torch.cuda.is_available():
            raise InputError("torch sees no CUDA device; --backend chunk measures eager calls on the CPU.")
        for tree in trees.values():
            if not (tree / "lkda" / "__init__.py").is_file():
                raise InputError(f"{tree} has no package lkda: give the root of a checkout.")
        check_output_file(options.out, option="--out")
        commits = {name: commit(tree) for name, tree in trees.items()}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                words = [options.backend, str(options.milliseconds), *shapes]
                runs[name].append(measure(name, tree, words))
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            content = {"commits": commits, "date": date, "rows": table(runs), "note": note(runs, commits, date)}
            write_json(options.out, {"kind": "table", **content, "runs": runs})
    except (InputError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
