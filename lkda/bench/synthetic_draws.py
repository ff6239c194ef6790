"""How fast one core draws the batches of the synthetic tasks: `python -m lkda.bench.synthetic_draws OUT.json`."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lkda.data.synthetic.datamodule import SyntheticDataModule
from lkda.data.synthetic.mqar import MQAR
from lkda.data.synthetic.mqar_answered import AnsweredMQAR
from lkda.data.synthetic.mqar_kimi import ConsecutiveMQAR
from lkda.data.synthetic.palindrome import Palindrome
from lkda.data.synthetic.stack import Stack

REPEATS = 15
PARTS = [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64), (1024, 256)]


def tasks() -> list[SyntheticDataModule]:
    """The parts of Zoology's training mixture, the longest of its validation, and the other tasks at 256 and 1024."""
    parts = [{"length": length, "pairs": pairs, "examples": 256} for length, pairs in PARTS]
    found: list[SyntheticDataModule] = [MQAR(train=[part], validation=[part]) for part in parts]
    return found + [
        task(context=length) for task in (Palindrome, ConsecutiveMQAR, AnsweredMQAR, Stack) for length in (256, 1024)
    ]


def measure(data: SyntheticDataModule) -> dict[str, Any]:
    """The median time of a training batch on one thread, as a row of a table."""
    batches = data.training_batches(rank=0, world_size=1)
    times = []
    for n in range(REPEATS + 2):
        begin = time.perf_counter()
        batches[n]
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[2:])
    part = data.train_parts[0]
    return {
        "task": data.source,
        "length": str(part["length"]),
        "pairs": str(part.get("pairs", "")),
        "examples a batch": str(data.batch_size),
        "ms a batch": seconds * 1e3,
        "million tokens/s": data.tokens_per_batch / seconds / 1e6,
    }


def main(arguments: list[str]) -> None:
    """Writes the table to the path that is given."""
    if len(arguments) != 1:
        raise SystemExit(__doc__)
    torch.set_num_threads(1)
    out = Path(arguments[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    note = f"One core ({platform.machine()}), the median of {REPEATS} batches."
    table = {"kind": "table", "rows": [measure(data) for data in tasks()], "note": note}
    out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
