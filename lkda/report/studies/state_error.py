"""Draws errors.json of `lkda.bench.state_error`: table.json, and a plot of how the error grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.style import LINES, Picture, Style, picture
from lkda.report.read.files import read_results_file

KIND = "state_error"


def redraw(path: Path) -> None:
    """Writes table.json and error_growth.png beside a file of `lkda.bench.state_error`.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        header, rows = found["header"], found["rows"]
        table = {"kind": "table", "rows": _table(rows), "note": _note(header, rows)}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not of lkda.bench.state_error ({error}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "error_growth.png", _growth(rows).light)


def _states(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["state_dtype"] for row in rows))


def _table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The error of o after the last token: a row for each dtype, a column for each decay."""
    last = max(row["step"] for row in rows)
    ends = {(row["state_dtype"], row["decay"]): row["error_o"] for row in rows if row["step"] == last}
    decays = sorted({decay for _, decay in ends}, reverse=True)
    return [
        {"state": dtype} | {f"{decay:g} nats per token": f"{ends[dtype, decay]:.1e}" for decay in decays}
        for dtype in _states(rows)
    ]


def _note(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    writes = "Every 100th token writes" if header["rare"] else "Every token writes"
    tokens, sequences = max(row["step"] for row in rows), header["sequences"]
    return (
        f"{writes}; relative error of o after {tokens:,} tokens, {sequences} sequence{'s' if sequences > 1 else ''}, "
        f"head size {header['head_dim']}, torch {header['torch']} on a CPU."
    )


def _growth(rows: list[dict[str, Any]]) -> Picture:
    """The error of o against the tokens read, with a panel for each decay."""
    decays = sorted({row["decay"] for row in rows}, reverse=True)

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(2.3 * len(decays), 2.9), layout="constrained")
        panels = figure.subplots(1, len(decays), sharey=True, squeeze=False)[0]
        colours = style.colours(_states(rows))
        for panel, decay in zip(panels, decays):
            for n, dtype in enumerate(_states(rows)):
                found = [row for row in rows if row["state_dtype"] == dtype and row["decay"] == decay]
                x, y = [row["step"] for row in found], [row["error_o"] for row in found]
                panel.loglog(x, y, LINES[n], color=colours[dtype], label=dtype)
            panel.set_title(f"decay {decay:g} nats per token", fontsize=9)
            panel.set_xlabel("tokens")
        panels[0].set_ylabel("relative error of o")
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
        return figure

    return picture(draw)
