"""Measures the table and the lessons of the notes that the project began with: `scripts/benchmark.py task=notes`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lkda.bench.notes import table
from lkda.checks import InputError
from lkda.commands.benchmarks.step_benchmark import open_console
from lkda.io import write_atomically
from lkda.report.draw.tables import rich_table
from lkda.report.studies import notes as report

RESULT = "notes.json"


def notes_benchmark(settings: Mapping[str, Any], device: torch.device) -> None:
    """Measure every row. Writes notes.json, tables and a plot into `out`.

    The JSON file is rewritten after every row, so a benchmark that is stopped keeps what it has measured.

    Args:
        settings: resolved, composed from configs/benchmark.yaml.
    Raises: InputError on a CPU, or if `out` cannot be written.
    """
    if device.type != "cuda":
        why = "it was asked for device=cpu" if torch.cuda.is_available() else "torch sees no CUDA device"
        raise InputError(f"task=notes measures CUDA kernels, and {why}; on a CPU, task=op measures operators.")
    out = Path(settings["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the directory {out}: {error.strerror}.") from error
    console = open_console()
    found: dict[str, Any] = {"kind": report.KIND, "header": table.header(device), "rows": []}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("the notes' table", total=table.count(device))
        for row in table.rows(device, found["header"], milliseconds=settings["milliseconds"]):
            found["rows"].append(row)
            write_atomically(out / RESULT, json.dumps(found, indent=1) + "\n")
            progress.update(task, advance=1, description=f"{row['part']}: {row['name']}")
    report.redraw(out / RESULT)
    for name, cells in report.tables(found, []).items():
        if name not in ("rows", "claims"):  # they are too wide for a terminal
            console.print(rich_table(*cells, names=report.NAMES[name]))
            console.print()
    console.print(f"{report.note(found)} JSON, every row, the claims of the notes and a plot are in {out}.")
