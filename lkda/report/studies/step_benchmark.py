"""Draws step_benchmark.json of `scripts/benchmark.py task=step`: tables, tokens/s, and where the time of a step goes.

The JSON is {"kind": "step_benchmark", "header": {device, torch, lkda, versions, git_commit, date}, "rows": [...]}. A
row holds title, implementation ("train": scripts/train.py's loop; "bare": the same model without Lightning; else a
model of another package), model, mixer, B, T, packed, the settings it was measured with, and the measurements of
`lkda.commands.benchmarks.step_clock`; or the reason why nothing was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.draw.tables import markdown_table
from lkda.report.draw.units import count
from lkda.report.read.files import read_results_file

KIND = "step_benchmark"
NAMES = 3  # the first columns of the table are names
Row = dict[str, Any]
_COMPILED_LLAMA = ("llama_compiled", "llama_graphs")
# The bars of a step in their order, each with its place in the palette: the classes of `lkda.bench.step_profile`, with
# the matrix products divided.
_SEGMENTS = {
    "projections": 0,
    "MLP": 5,
    "head": 7,
    "operator": 1,
    "convolution": 2,
    "norms": 3,
    "loss": 4,
    "optimizer": 8,
    "element-wise": 6,
}
_IDLE = "idle"
_DIVIDED = "The time of matrix products is divided into projections, MLP and head by their FLOPs."


def same_batch(row: Row) -> tuple[str, int, int]:
    """Rows that are equal in this are compared: model, rows of a batch, tokens of a row."""
    return str(row["model"]), int(row["B"]), int(row["T"])


def packings(rows: Sequence[Row]) -> list[bool]:
    """Whether the rows have one document each (False), or packed documents (True): each that occurs."""
    return sorted({bool(row["packed"]) for row in rows})


def llama(row: Row, rows: Sequence[Row], key: str) -> float | None:
    """Of the compiled Llama at the same model and batch, the better value of `key`: the highest speed, or the least
    memory. None if it was not measured, or if the row is packed."""
    there = [
        other[key]
        for other in rows
        if other["implementation"] in _COMPILED_LLAMA and same_batch(other) == same_batch(row) and other.get(key)
    ]
    if row["packed"] or not there:
        return None
    return float(max(there) if key == "tokens_per_s" else min(there))


def loop_cost(row: Row, rows: Sequence[Row]) -> float | None:
    """By how much scripts/train.py's loop is slower than a bare loop, as a share of its time."""
    if row["implementation"] != "train" or not row.get("tokens_per_s"):
        return None
    key = (*same_batch(row), row["mixer"], row["packed"])
    bare = [
        other["tokens_per_s"]
        for other in rows
        if other["implementation"] == "bare"
        and (*same_batch(other), other["mixer"], other["packed"]) == key
        and other.get("tokens_per_s")
    ]
    return bare[0] / row["tokens_per_s"] - 1 if bare else None


def as_cells(rows: Sequence[Row], *, packed: bool | None = None) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text. Columns that would be empty are left out; a row without a measurement has the
    reason as its last cell.

    Args:
        packed: whether the rows with or those without packed documents are shown; None: all, packed ones last.
    """
    lines = [row for each in ((False, True) if packed is None else (packed,)) for row in rows if row["packed"] == each]

    def over(key: str) -> Callable[[Row], float | None]:
        def ratio(row: Row) -> float | None:
            base = llama(row, rows, key)
            return None if base is None or not row.get(key) else row[key] / base

        return ratio

    def of_profile(row: Row) -> float | None:
        return row.get("profile", {}).get("idle_share")

    columns: list[tuple[str, Callable[[Row], float | None], str]] = [
        ("tokens/s", lambda row: row.get("tokens_per_s"), "{:,.0f}"),
        ("x compiled Llama", over("tokens_per_s"), "{:.2f}"),
        ("ms per step", lambda row: row.get("step_ms"), "{:.2f}"),
        ("idle", of_profile, "{:.1%}"),
        ("loop cost", lambda row: loop_cost(row, rows), "{:+.1%}"),
        ("MFU", lambda row: row.get("mfu"), "{:.1%}"),
        ("reserved GiB", lambda row: row.get("reserved_gib"), "{:.2f}"),
        ("x Llama's memory", over("reserved_gib"), "{:.2f}"),
        ("allocated GiB", lambda row: row.get("allocated_gib"), "{:.2f}"),
        ("first step s", lambda row: row.get("first_step_s"), "{:.1f}"),
        ("cold first step s", lambda row: row.get("cold_first_step_s"), "{:.1f}"),
        ("imports s", lambda row: row.get("imports_s"), "{:.1f}"),
    ]
    shown = [column for column in columns if any(column[1](row) is not None for row in lines)]
    missing = any("tokens_per_s" not in row for row in lines)
    head = ["model", "B x T", "what", *(heading for heading, _, _ in shown), *(["why not"] if missing else [])]
    body = []
    for row in lines:
        cells = [row["model"], f"{row['B']}x{row['T']}{' packed' * (row['packed'] and packed is None)}", row["title"]]
        for _, value, form in shown:
            found = value(row)
            cells.append("" if found is None else form.format(found))
        body.append([*cells, str(row.get("reason", ""))[:80]] if missing else cells)
    return head, body


def note(found: dict[str, Any]) -> str:
    """The device, the settings that all rows share, and the versions, in words."""
    header, first = found["header"], found["rows"][0]
    installed = [f"{name} {version}" for name, version in header.get("versions", {}).items() if version]
    overrides = f", overrides {' '.join(first['overrides'])}" if first["overrides"] else ""
    packages = ", ".join(installed) or f"torch {header['torch']}"
    return (
        f"{header['device']}, {packages}; vocabulary {first['vocab_size']:,}, "
        f"compile={str(first['compile']).lower()}{overrides}, medians over {first['steps']} steps; "
        f"{header.get('date', '')[:10]}."
    )


def as_markdown(found: dict[str, Any]) -> str:
    """The tables of a results file for a page, with a note."""
    parts = []
    for packed in packings(found["rows"]):
        what = "Packed documents of many lengths" if packed else "One document in each row"
        parts.append(f"{what}:\n\n{markdown_table(*as_cells(found['rows'], packed=packed), names=NAMES)}")
    return "\n".join(parts) + "\n" + note(found)


def redraw(path: Path) -> None:
    """Writes table.md, the same as table.json, and the plots tokens_per_s.png and step_time.png beside a results file.

    Raises: ValueError where it is not of scripts/benchmark.py task=step.
    """
    found = read_results_file(path, kind=KIND)
    try:
        head, body = as_cells(found["rows"])
        table = {"kind": "table", "rows": [dict(zip(head, cells)) for cells in body], "note": note(found)}
        files: dict[Path, str | bytes] = {
            path.parent / "table.md": as_markdown(found) + "\n",
            path.parent / "table.json": json.dumps(table, indent=1) + "\n",  # lkda.report.readme writes it into a page
        }
        drawn = [row for row in found["rows"] if row["implementation"] != "bare"]
        if any(row.get("tokens_per_s") for row in drawn):
            files[path.parent / "tokens_per_s.png"] = speeds(found["rows"]).light
        if any(row.get("tokens_per_s") and "profile" in row for row in drawn):
            files[path.parent / "step_time.png"] = step_times(found["rows"]).light
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not of scripts/benchmark.py task=step ({error!r}).") from error
    write_together(files)


Panels = dict[str, list[Row]]


def _panels(rows: Sequence[Row], *, bare: bool) -> Panels:
    """The rows to draw by model, batch and packing; the fastest first."""
    found: Panels = {}
    for row in rows:
        if row.get("tokens_per_s") and (bare or row["implementation"] != "bare"):
            packed = ", packed" if row["packed"] else ""
            found.setdefault(f"{row['model']}, {row['B']} x {row['T']}{packed}", []).append(row)
    return {title: sorted(panel, key=lambda row: -row["tokens_per_s"]) for title, panel in found.items()}


def _figure(panels: Panels, *, extra: float = 0.0) -> Iterator[Any]:
    """The figure first, then the axes of each panel: one below the other, as high as its number of bars."""
    heights = [0.75 + 0.32 * max(len(panel), 2) for panel in panels.values()]
    figure = Figure(figsize=(8.2, sum(heights) + extra), layout="constrained")
    yield figure
    yield from figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]


def speeds(rows: Sequence[Row]) -> Picture:
    """Tokens per second: a panel for each model and batch, a bar for each implementation."""
    panels = _panels(rows, bare=False)

    def draw(style: Style) -> Figure:
        figure, *axes = _figure(panels)
        colours = style.colours(list(dict.fromkeys(_subject(row) for panel in panels.values() for row in panel)))
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            values = [row["tokens_per_s"] for row in panel]
            places = range(len(panel))
            axis.barh(places, values, height=0.7, color=[colours[_subject(row)] for row in panel])
            for place, (row, value) in enumerate(zip(panel, values, strict=True)):
                base = llama(row, rows, "tokens_per_s")
                ratio = "" if base is None or row["implementation"] != "train" else f"  ({value / base:.2f} x Llama)"
                _label(axis, f"{count(value)}{ratio}", (value, place), style, fontsize=10)
            _finish(axis, title, panel, right=1.4 * max(values))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value else "0"))
        axes[-1].set_xlabel("tokens/s")
        return figure

    return picture(draw)


def step_times(rows: Sequence[Row]) -> Picture:
    """Where the time of a step goes: a panel for each model and batch, a stacked bar for each implementation."""
    profiled = {title: [row for row in panel if "profile" in row] for title, panel in _panels(rows, bare=False).items()}
    panels = {title: panel for title, panel in profiled.items() if panel}

    def draw(style: Style) -> Figure:
        figure, *axes = _figure(panels, extra=0.6)
        for axis, (title, panel) in zip(axes, panels.items(), strict=True):
            places = range(len(panel))
            left = [0.0] * len(panel)
            for name in (*_SEGMENTS, _IDLE):
                widths = [_milliseconds(row, name) for row in panel]
                colour = style.grid if name == _IDLE else style.palette[_SEGMENTS[name]]
                hatch = {"hatch": "////", "edgecolor": style.faint, "linewidth": 0.0} if name == _IDLE else {}
                axis.barh(places, widths, left=left, height=0.7, color=colour, label=name, **hatch)
                left = [before + width for before, width in zip(left, widths, strict=True)]
            for place, (row, end) in enumerate(zip(panel, left, strict=True)):
                said = f"{row['step_ms']:.1f} ms, {row['profile']['idle_share']:.0%} idle"
                _label(axis, said, (end, place), style, fontsize=8)
            _finish(axis, title, panel, right=1.25 * max(left))
        axes[-1].set_xlabel("milliseconds of a step")
        handles, names = axes[0].get_legend_handles_labels()
        figure.suptitle(_DIVIDED, fontsize=9, color=style.faint, x=0.01, ha="left")
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
        return figure

    return picture(draw)


def _milliseconds(row: Row, name: str) -> float:
    """Of a step, in the segment of a bar with that name."""
    found = row["profile"]
    if name == _IDLE:
        return float(found["idle_share"] * row["step_ms"])
    share = row.get("product_shares", {}).get(name)
    return float(found["ms"].get(name, 0.0) if share is None else share * found["ms"]["matrix products"])


def _subject(row: Row) -> str:
    """What a colour stands for: a mixer of lkda, or a model of another package."""
    return str(row["mixer"] if row["implementation"] in ("train", "bare") else row["title"])


def _label(axis: Any, text: str, end: tuple[float, float], style: Style, *, fontsize: float) -> None:
    """Write beside the end of a bar, on a box that hides the grid lines behind the letters."""
    box = {"facecolor": style.background, "edgecolor": "none", "pad": 1.5}
    axis.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=fontsize, bbox=box)


def _finish(axis: Any, title: str, panel: Sequence[Row], *, right: float) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_yticks(range(len(panel)), [row["title"] for row in panel])
    axis.set_ylim(max(len(panel), 2) - 0.4, -0.6)  # the first row at the top; a single bar is no thicker
    axis.set_xlim(0, right)
    axis.grid(axis="y", visible=False)
    axis.grid(axis="x", visible=True)
