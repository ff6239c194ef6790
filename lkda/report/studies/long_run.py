"""Draws long_run.json of `lkda.commands.studies.long_run`, memory and step time over a long run, and table.json."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.read.files import read_results_file

KIND = "long_run"
Row = dict[str, Any]
# Each column with its name in the plot and the table, and the factor to the unit there. A run has those of a CPU or of
# a GPU.
SHOWN = {
    "device_bytes": ("memory reserved on the GPU in MiB", 2**-20),
    "seconds_per_step": ("time of a step in ms", 1e3),
    "resident_bytes": ("memory of the process in MiB", 2**-20),
    "objects": ("Python objects in thousands", 1e-3),
    "cpu_seconds_per_step": ("CPU time of a step in ms", 1e3),
    "steps_per_fixed": ("CPU time of a step / fixed calculation", 1.0),
}


def redraw(path: Path) -> None:
    """Writes table.json and long_run.png beside a file of `lkda.commands.studies.long_run`.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        header, rows = found["header"], found["rows"]
        table = {"kind": "table", "rows": _table(rows), "note": _note(header)}
        drawn = _plot(rows)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not of lkda.commands.studies.long_run ({error}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "long_run.png", drawn.light)


def _shown(rows: list[Row]) -> dict[str, tuple[str, float]]:
    return {column: named for column, named in SHOWN.items() if column in rows[0]}


def quarters(rows: list[Row], column: str) -> list[float]:
    """The medians of a column in the second, third and last quarter of the run. In the first, caches are filled."""
    size = len(rows) // 4
    return [statistics.median(row[column] for row in rows[n * size : (n + 1) * size]) for n in (1, 2, 3)]


def _table(rows: list[Row]) -> list[dict[str, str]]:
    made = []
    for column, (name, factor) in _shown(rows).items():
        second, third, last = (value * factor for value in quarters(rows, column))
        values = {"second quarter": f"{second:.2f}", "third quarter": f"{third:.2f}", "last quarter": f"{last:.2f}"}
        made.append({"median of": name, **values, "growth": f"{last / second - 1:+.1%}"})
    return made


def _note(header: dict[str, Any]) -> str:
    of_gpu = header["device"] != "cpu"
    where = header["device"] if of_gpu else f"{header['threads']} thread{'s' * (header['threads'] > 1)} of a CPU"
    settings = " ".join(header.get("settings") or [])
    model = f"with the settings {settings}" if settings else "of a very small KDA model"
    length = f" in {header['minutes']:g} minutes" if header.get("minutes") else ""
    return (
        f"{header['steps']:,} steps{length} {model} with validations and checkpoints, {where}, torch {header['torch']}."
    )


def _plot(rows: list[Row]) -> Picture:
    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(12, 2.6), layout="constrained")
        shown = _shown(rows)
        for panel, (column, (name, factor)) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
            panel.plot([row["step"] for row in rows], [row[column] * factor for row in rows], color=style.palette[0])
            panel.set_ylim(0, 1.1 * max(row[column] * factor for row in rows))
            panel.set_title(name, fontsize=9)
            panel.set_xlabel("step")
        return figure

    return picture(draw)
