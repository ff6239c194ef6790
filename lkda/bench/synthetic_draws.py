"""How fast one core generates the batches of the synthetic tasks.

    python -m lkda.bench.synthetic_draws --out docs/results/synthetic_draws/table.json

Each task is generated on one thread. The table names the median time of a batch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from lkda.bench.files import write_json
from lkda.checks import InputError
from lkda.data.synthetic.datamodule import SyntheticDataModule
from lkda.data.synthetic.mqar import MQAR
from lkda.data.synthetic.mqar_answered import AnsweredMQAR
from lkda.data.synthetic.mqar_kimi import ConsecutiveMQAR
from lkda.data.synthetic.palindrome import Palindrome
from lkda.data.synthetic.stack import Stack
from lkda.io import check_output_file

REPEATS = 15
SHAPES = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64), (1024, 256)]


def tasks() -> list[SyntheticDataModule]:
    """The subsets of Zoology's training mixture, the longest of its validation, and the other tasks at 256 and 1024."""
    subsets = [{"length": length, "pairs": pairs, "examples": 256} for length, pairs in SHAPES]
    found: list[SyntheticDataModule] = [MQAR(train=[subset], validation=[subset]) for subset in subsets]
    return found + [
        task(context=length) for task in (Palindrome, ConsecutiveMQAR, AnsweredMQAR, Stack) for length in (256, 1024)
    ]


def measure(data: SyntheticDataModule) -> dict[str, Any]:
    """A row of the table: the median time of a training batch on one thread."""
    batches = data.training_batches(rank=0, world_size=1)
    times = []
    for n in range(REPEATS + 2):
        begin = time.perf_counter()
        batches[n]
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[2:])
    subset = data.train_subsets[0]
    return {
        "task": data.source,
        "length": str(subset["length"]),
        "pairs": str(subset.get("pairs", "")),
        "examples per batch": str(data.batch_size),
        "ms per batch": seconds * 1e3,
        "million tokens/s": data.tokens_per_batch / seconds / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args().out
    try:
        check_output_file(out, option="--out")
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    torch.set_num_threads(1)
    rows = []
    for data in tasks():
        rows.append(measure(data))
        row = rows[-1]
        print(f"{row['task']} of {row['length']} tokens: {row['ms per batch']:.1f} ms per batch", flush=True)
    note = f"One core ({platform.machine()}), the median of {REPEATS} batches."
    write_json(out, {"kind": "table", "rows": rows, "note": note})


if __name__ == "__main__":
    main()
