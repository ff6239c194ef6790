"""Draws long_run.json of `lkda.commands.long_run`: memory and the time of a step over a long run, and table.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkda.checks import InputError
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.read.files import read_results_file, write_atomically

KIND = "long_run"
Row = dict[str, Any]
# Each column with its name in the plot and the table, and the factor to the unit there.
SHOWN = {
    "resident_bytes": ("memory of the process in MiB", 2**-20),
    "objects": ("Python objects in thousands", 1e-3),
    "cpu_seconds_per_step": ("CPU time of a step in ms", 1e3),
    "steps_per_fixed": ("CPU time of a step / fixed calculation", 1.0),
}


def redraw(path: Path) -> None:
    """Writes table.json and long_run.png beside a file of `lkda.commands.long_run`.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        header, rows = found["header"], found["rows"]
        table = {"kind": "table", "rows": _table(rows), "note": _note(header)}
        drawn = _plot(rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not of lkda.commands.long_run ({error}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "long_run.png", drawn.light)


def quarters(rows: list[Row], column: str) -> list[float]:
    """The medians of a column in the second, third and last quarter of the run. In the first, caches are filled."""
    size = len(rows) // 4
    return [statistics.median(row[column] for row in rows[n * size : (n + 1) * size]) for n in (1, 2, 3)]


def _table(rows: list[Row]) -> list[dict[str, str]]:
    made = []
    for column, (name, factor) in SHOWN.items():
        second, third, last = (value * factor for value in quarters(rows, column))
        values = {"second quarter": f"{second:.2f}", "third quarter": f"{third:.2f}", "last quarter": f"{last:.2f}"}
        made.append({"median of": name, **values, "growth": f"{last / second - 1:+.1%}"})
    return made


def _note(header: dict[str, Any]) -> str:
    return (
        f"{header['steps']:,} steps of a very small KDA model with validations and checkpoints, {header['threads']} "
        f"thread{'s' if header['threads'] > 1 else ''} of a CPU, torch {header['torch']}."
    )


def _plot(rows: list[Row]) -> Picture:
    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(12, 2.6), layout="constrained")
        for panel, (column, (name, factor)) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
            panel.plot([row["step"] for row in rows], [row[column] * factor for row in rows], color=style.palette[0])
            panel.set_ylim(bottom=0)
            panel.set_title(name, fontsize=9)
            panel.set_xlabel("step")
        return figure

    return picture(draw)
