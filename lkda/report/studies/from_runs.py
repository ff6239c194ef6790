"""The command of a study that is collected from run directories."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lkda.io import write_atomically
from lkda.report.read.runs import Run, read_runs


def write_study(
    arguments: Sequence[str],
    *,
    usage: str | None,
    collect: Callable[[Sequence[Run]], dict[str, Any]],
    redraw: Callable[[Path], None],
) -> tuple[dict[str, Any], Path]:
    """Writes runs.json, and what `redraw` makes of it. Returns the content of runs.json, and the directory.

    Args:
        arguments: glob patterns of run directories, then the directory to write into.
        usage: printed if there are fewer than two arguments.
        collect: the content of runs.json for finished runs.
        redraw: takes the path of runs.json.
    Raises: SystemExit with a message if the runs do not fit.
    """
    if len(arguments) < 2:
        raise SystemExit(usage)
    *patterns, out = arguments
    runs, skipped = read_runs({Path(path) for pattern in patterns for path in glob.glob(pattern)})
    for path, reason in skipped:
        print(f"left out {path}: {reason}")
    directory = Path(out)
    try:
        found = collect(runs)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "runs.json", json.dumps(found, indent=1) + "\n")
        redraw(directory / "runs.json")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return found, directory


def print_rows(rows: Sequence[dict[str, str]]) -> None:
    """A line for each row of a table, without its empty cells."""
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items() if value))
