"""Draws scaling.json of `lkda.commands.studies.scaling`: table.json, agreement.json, a plot of speed and contexts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.labels import ABOVE_GRID
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.draw.units import length
from lkda.report.read.files import read_results_file

KIND = "scaling"
# What `lkda.commands.studies.scaling` measures, in the order of importance.
PARTS = ("base", "large", "context", "agreement", "longest")
_NAMES = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP", "context_parallel": "context parallel"}

Row = Mapping[str, Any]


def redraw(path: Path) -> None:
    """Writes table.json, agreement.json and scaling.png beside a file of `lkda.commands.studies.scaling`.

    A table of which no run was measured is not written.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        rows = sorted(found["rows"], key=_order)
        made = {"table.json": speeds(rows), "agreement.json": agreement(rows)}
        note = _note([row for row in rows if "reason" not in row], found["date"])
        files: dict[Path, str | bytes] = {
            path.parent / name: json.dumps({"kind": "table", "rows": table, "note": note}, indent=1) + "\n"
            for name, table in made.items()
            if table
        }
        if made["table.json"]:
            files[path.parent / "scaling.png"] = _plot(rows).light
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not of lkda.commands.studies.scaling ({error!r}).") from error
    write_together(files)


def _order(row: Row) -> tuple[int, str, int, int, int]:
    how = tuple(_NAMES).index(row["how"])
    return PARTS.index(row["part"]), row.get("checkpointing", ""), row["tokens"] or 0, row["gpus"], how


def share_of_linear(row: Row, rows: Sequence[Row]) -> float | None:
    """The tokens/s of a run as a share of those of one GPU times the number of GPUs. None where one GPU was not
    measured with as many tokens on a GPU."""
    for one in rows:
        if one["how"] == "single" and "reason" not in one and _load(one) == _load(row):
            return float(row["tokens_per_s"] / (row["gpus"] * one["tokens_per_s"]))
    return None


def _load(row: Row) -> tuple[Any, ...]:
    return row["part"], row["tokens"], row["checkpointing"]


def speeds(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A row for each run whose speed was measured."""
    made = []
    for row in rows:
        if row["part"] == "agreement" or "reason" in row:
            continue
        share, mfu, peak = share_of_linear(row, rows), row.get("mfu"), row.get("peak_memory_gib")
        stopped = row["checkpoint_seconds"] / row["checkpoints"] if row["checkpoints"] else None
        made.append(
            {
                "model": row["model"],
                "parameters": f"{row['params'] / 1e6:,.0f}M",
                "devices": str(row["gpus"]),
                "with": _NAMES[row["how"]],
                "context": length(row["context"]),
                "checkpointing": row["checkpointing"],
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "share of linear": "" if share is None else f"{share:.3f}",
                "MFU": "" if mfu is None else f"{mfu:.1%}",
                "peak GiB per device": "" if peak is None else f"{peak:.1f}",
                "seconds for a checkpoint": "" if stopped is None else f"{stopped:.2f}",
            }
        )
    return made


def agreement(rows: Sequence[Row]) -> list[dict[str, str]]:
    """How far the training losses are from those of one GPU, for each other run at the same global batch; [] where one
    GPU was not measured."""
    measured = [row for row in rows if row["part"] == "agreement" and "reason" not in row]
    one = next((row for row in measured if row["how"] == "single"), None)
    if one is None:
        return []
    made = []
    for row in measured:
        largest, first = difference(row["losses"], one["losses"]), row["losses"][min(row["losses"], key=int)]
        last = max(row["losses"], key=int)
        made.append(
            {
                "devices": str(row["gpus"]),
                "with": _NAMES[row["how"]],
                "loss of step 1": f"{first:.5f}",
                f"loss of step {last}": f"{row['losses'][last]:.5f}",
                "validation loss": f"{row['val/loss']:.5f}",
                "largest difference from one device in any step": "" if row is one else f"{largest:.2%}",
            }
        )
    return made


def difference(losses: Mapping[str, float], others: Mapping[str, float]) -> float:
    """The largest difference between the losses of a step, as a share of the other loss."""
    if losses.keys() != others.keys():
        raise ValueError("runs of the agreement have other steps than one GPU")
    return max(abs(loss / others[step] - 1) for step, loss in losses.items())


def _note(rows: Sequence[Row], date: str) -> str:
    device = next((row["device"] for row in rows if row["gpus"] == 1), rows[0]["device"].partition(" x ")[2])
    versions = rows[0]["versions"]
    return (
        f"{device}, torch {versions['torch']}, lightning {versions['lightning']}, {rows[0]['precision']}; {date[:10]}."
    )


def _plot(rows: Sequence[Row]) -> Picture:
    """Tokens/s as a share of linear scaling, and the longest context, by number of GPUs."""
    measured = [row for row in rows if "reason" not in row and row["part"] != "agreement"]

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(9, 4.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_shares(left, measured, style)
        _draw_longest(right, measured, style)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_locator(FixedLocator(sorted({row["gpus"] for row in measured})))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda gpus, _: f"{gpus:g}"))
            axis.set_xlabel("devices")
        if left.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower left", ncols=2, fontsize=9, frameon=False)
        return figure

    return picture(draw)


def _draw_shares(axis: Axes, rows: Sequence[Row], style: Style) -> None:
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        share = share_of_linear(row, rows)
        if share is not None and row["gpus"] > 1:
            sequence = f", {length(row['tokens'])} tokens per device" if row["tokens"] else ""
            name = f"{row['model']}, {_NAMES[row['how']]}{sequence}"
            curves.setdefault(name, {1: 1.0})[row["gpus"]] = share
    colours = style.colours(list(curves))
    for name, curve in curves.items():
        axis.plot(list(curve), list(curve.values()), "o-", markersize=4, color=colours[name], label=name)
    axis.axhline(1.0, color=style.faint, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, 1.1)
    axis.set_title("tokens/s, as a share of linear scaling", fontsize=10, loc="left")


def _draw_longest(axis: Axes, rows: Sequence[Row], style: Style) -> None:
    longest: dict[int, int] = {}
    for row in rows:
        if row["part"] in ("context", "longest"):
            longest[row["gpus"]] = max(row["context"], longest.get(row["gpus"], 0))
    gpus = sorted(longest)
    axis.plot(gpus, [longest[n] for n in gpus], "o-", markersize=4, color=style.palette[0])
    for n in gpus:  # a rising line leaves the place below the first point and those above and left of the others free
        axis.annotate(
            length(longest[n]),
            (n, longest[n]),
            (0, -16) if n == gpus[0] else (0, 11),
            textcoords="offset points",
            ha="left" if n == gpus[0] else "right",
            fontsize=9,
            zorder=ABOVE_GRID,
            bbox={"facecolor": style.background, "edgecolor": "none", "pad": 0.5},
        )
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda tokens, _: length(tokens)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.margins(y=0.15)
    axis.set_title("longest context that was trained, in tokens", fontsize=10, loc="left")
