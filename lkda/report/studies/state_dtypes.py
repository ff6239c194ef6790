"""What a state of lower precision costs in decoding, from files of `scripts/evaluate.py stepwise=true out=`.

    python -m lkda.report.studies.state_dtypes 'multirun/lm_by_mixer_full/*/state_*.json' outputs/state_dtypes

This writes evaluations.json, which holds what it read, and table.json with a row for each mixer and data set and a
column for each dtype. A cell is the mean over runs of bits per byte for text and of the accuracy for other data. In
brackets is the difference from float32. Evaluations that were not stepwise, and models without KDA, are left out.
An evaluations.json that it wrote before may be among the files: what it holds is added.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.tables import rich_table
from lkda.report.read.evaluations import Record, evaluations_of_arguments, keep_evaluations, kept_evaluations

KIND = "state_dtypes"
DTYPES = ("float32", "bfloat16", "int8")
MEASURES = {"bits_per_byte": "bits per byte", "accuracy": "accuracy"}


Values = dict[str, dict[str, float]]  # {dtype: {checkpoint: value}}


def rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each mixer, data set and measure, with its mean in every dtype that was measured.

    Raises: ValueError where none of them was stepwise, or the dtypes of a row were measured on different checkpoints.
    """
    found: dict[tuple[str, str, str], Values] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        for measure in MEASURES.keys() & record["result"].keys():
            if record["state_dtype"] is not None:
                key = _data(record["data"]), record["run"]["mixer"], measure
                found[key][record["state_dtype"]][record["ckpt"]] = record["result"][measure]
    if not found:
        raise InputError(
            "no evaluation says which dtype the state had: evaluate models with KDA layers with stepwise=true."
        )
    seen = [dtype for dtype in DTYPES if any(dtype in values for values in found.values())]
    for (data, mixer, _), values in found.items():
        if any(values[dtype].keys() != values[seen[0]].keys() for dtype in seen):
            counts = ", ".join(f"{len(values[dtype])} in {dtype}" for dtype in seen)
            raise InputError(
                f"{mixer} on {data} was evaluated for different checkpoints ({counts}): give each in every dtype."
            )
    return [
        {"mixer": mixer, "data": data, "measured": MEASURES[measure]} | {dtype: _cell(values, dtype) for dtype in seen}
        for (data, mixer, measure), values in sorted(found.items())
    ]


def _data(config: Mapping[str, Any]) -> str:
    """The name of the data and the tokens per sequence, as "prose 1024". Synthetic tasks are named by their module."""
    name = config.get("source") or config["_target_"].split(".")[-2]
    return f"{name} {config['context']}" if "context" in config else name


def _cell(values: Values, dtype: str) -> str:
    mean = statistics.fmean(values[dtype].values())
    if dtype == "float32" or "float32" not in values:
        return f"{mean:.4f}"
    return f"{mean:.4f} ({mean - statistics.fmean(values['float32'].values()):+.4f})"


def write(records: Sequence[Record], directory: Path) -> list[dict[str, str]]:
    """Writes table.json into `directory`. Returns: its rows. Raises: ValueError as `rows` does."""
    made = rows(records)
    note = "Read token by token, with KDA's states in that dtype. In brackets: the difference from float32."
    table = {"kind": "table", "rows": made, "note": note}
    write_atomically(directory / "table.json", json.dumps(table, indent=1) + "\n")
    return made


def redraw(path: Path) -> None:
    """Writes the table of kept evaluations beside them. Raises: ValueError where there are none."""
    write(kept_evaluations(path, kind=KIND), path.parent)


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of files, then the directory to write into."""
    try:
        records, out = evaluations_of_arguments(arguments, usage=__doc__, also=("ckpt", "state_dtype"))
        rows(records)  # raises before anything is written
        keep_evaluations(records, out, kind=KIND)
        made = write(records, out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    Console().print(rich_table([*made[0]], [[*row.values()] for row in made], names=3))


if __name__ == "__main__":
    main(sys.argv[1:])
