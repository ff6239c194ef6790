"""How changes of the recipe affect each mixer: makes table.json of docs/results/recipe_*/runs.json.

The table has a row for each set of settings and a column for each mixer. A cell holds the bits per byte of the
validation and, in brackets, the share of steps whose gradient was clipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lkda.report.read.files import read_results_file, write_atomically

KIND = "recipe"
_QK_NORM = "mixer.softmax.qk_norm=true"
_BEFORE = ("model.embed_norm=false", "optimizer.lr=2e-3")
_GROUPS = ("model.", "optimizer.", "scheduler.", "trainer.", "data.", "mixer.")


def rows(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of the table, in the order in which the settings first occur."""
    columns = list(dict.fromkeys(_column(run) for run in runs))
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        cell = f"{run['bits_per_byte']:.3f} ({run['clipped_share']:.1%})"
        found.setdefault(_settings(run["overrides"]), {})[_column(run)] = cell
    return [
        {"changed": settings, **{column: cells.get(column, "") for column in columns}}
        for settings, cells in found.items()
    ]


def _column(run: dict[str, Any]) -> str:
    return f"{run['mixer']}, QK-norm" if _QK_NORM in run["overrides"] else run["mixer"]


def _settings(overrides: str) -> str:
    """What differs from the earlier recipe, as `embed_norm=true lr=4e-3`."""
    kept = [word for word in overrides.split() if word not in (_QK_NORM, *_BEFORE) and not word.startswith("mixer=")]
    for group in _GROUPS:
        kept = [word.removeprefix(group) for word in kept]
    return " ".join(f"`{word}`" for word in kept) or "nothing"


def redraw(path: Path) -> None:
    """Writes table.json beside a file of runs. Raises: ValueError where the file is of another kind."""
    found = read_results_file(path, kind=KIND)
    table = {"kind": "table", "rows": rows(found["runs"]), "note": found["note"]}
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
