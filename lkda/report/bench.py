"""A benchmark's JSON -> a table, and plots of time against the floor and of cost per token against length.

The JSON is {"header": {device, date, copy_gb_per_s, versions ...}, "rows": [...]}. A row holds op, backend, peer (None
for our own), B, T, H, D, dtype, gate, mode ("fwd" or "fwd+bwd"), replay ("eager" or "graph"), ms_median, ms_p20,
ms_p80, floor_ms, fraction_of_floor, gb_per_s, error, peak_mib, registers, shared_bytes; and, where nothing was measured,
its reason.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.table import Table

from lkda.report.plots import PALETTE, STYLE, png
from lkda.report.table import count

Row = dict[str, Any]


def read_benchmark(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Header and rows. Raises ValueError where the file is not a benchmark's."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["header"], found["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a benchmark's JSON ({error}); scripts/benchmark.py writes one.") from error


def shape(row: Row) -> str:
    """8x2048x16x64, B x T x H x D."""
    return "x".join(str(row[axis]) for axis in "BTHD")


def implementation(row: Row) -> str:
    """The peer's name, or our backend's."""
    return str(row.get("peer") or f"lkda {row['backend']}")


def lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table."""
    head = ["op", "shape", "dtype", "gate", "implementation", "mode", "ms", "p20-p80", "graph ms", "x floor", "GB/s"]
    head += ["error", "peak MiB"]
    graphs = {_key(row): row.get("ms_median") for row in rows if row["replay"] == "graph"}
    body = []
    for row in rows:
        if row["replay"] == "graph":
            continue
        cells = [row["op"], shape(row), row["dtype"], row.get("gate") or "", implementation(row), row["mode"]]
        if row.get("ms_median") is None:
            body.append([*cells, row.get("reason") or "not measured", *[""] * (len(head) - len(cells) - 1)])
            continue
        over = row["ms_median"] / row["floor_ms"] if row.get("floor_ms") else None
        graph = graphs.get(_key(row))
        body.append(
            [
                *cells,
                f"{row['ms_median']:.3f}",
                f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}",
                "" if graph is None else f"{graph:.3f}",
                "" if over is None else f"{over:.2f}",
                "" if row.get("gb_per_s") is None else f"{row['gb_per_s']:,.0f}",
                "" if row.get("error") is None else f"{row['error']:.1e}",
                "" if row.get("peak_mib") is None else f"{row['peak_mib']:,.0f}",
            ]
        )
    return head, body


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "B", "T", "H", "D", "dtype", "gate", "backend", "peer", "mode"))


def as_rich(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    head, body = lines(rows)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for n, heading in enumerate(head):
        table.add_column(heading, justify="right" if n > 5 else "left", no_wrap=True)
    for line in body:
        table.add_row(*line)
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """For a page: a pipe table."""
    head, body = lines(rows)
    rule = ["---" if n <= 5 else "---:" for n in range(len(head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *body])


def time_bars(rows: Sequence[Row], *, mode: str) -> bytes:
    """PNG: eager time of every implementation at every shape, log axis, a tick at each shape's floor."""
    rows = [row for row in rows if row["mode"] == mode and row["replay"] == "eager" and row.get("ms_median")]
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        panels[f"{row['op']}  {shape(row)}  {row['dtype']}  {row.get('gate') or ''}".strip()].append(row)
    names = list(dict.fromkeys(implementation(row) for row in rows))
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)}
    with mpl.rc_context(STYLE):
        height = sum(0.24 * len(panel) + 0.42 for panel in panels.values()) + 0.8
        figure = Figure(figsize=(7.6, height), layout="constrained")
        axes = figure.add_subplot()
        at, ticks, labels = 0.0, [], []
        for title, panel in panels.items():
            axes.text(0, at - 0.15, title, transform=axes.get_yaxis_transform(), fontsize=9, weight="bold", va="bottom")
            top = at
            for row in sorted(panel, key=lambda row: row["ms_median"]):
                name, ms = implementation(row), row["ms_median"]
                at += 1
                axes.barh(at, ms, color=colours[name], height=0.8)
                axes.annotate(f"{ms:.3g}", (ms, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
                ticks.append(at)
                labels.append(name)
            if panel[0].get("floor_ms"):
                axes.plot(
                    [panel[0]["floor_ms"]] * 2, [top + 0.5, at + 0.5], color="#444444", linewidth=1.4, linestyle=":"
                )
            at += 1.7
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.1, y=0.01)
        axes.set_xlabel(f"{mode}, ms (dotted: the floor, the bytes that must move over the memory's measured speed)")
        return png(figure)


def cost_by_length(rows: Sequence[Row], *, mode: str) -> bytes:
    """PNG: nanoseconds a token and head against T, for the rows of one op at H x D heads and fixed B x T."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["mode"] == mode and row["replay"] == "eager" and row.get("ms_median"):
            tokens = row["B"] * row["T"] * row["H"]
            curves[implementation(row)].append((row["T"], row["ms_median"] * 1e6 / tokens))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for n, (name, points) in enumerate(curves.items()):
            xs, ys = zip(*sorted(points))
            colour = PALETTE[n % len(PALETTE)]
            axes.plot(xs, ys, color=colour, marker="o", markersize=4, linewidth=1.8)
            axes.annotate(
                name, (xs[-1], ys[-1]), (6, 0), textcoords="offset points", color=colour, va="center", fontsize=9
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.margins(x=0.14)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("sequence length T, at a fixed number of tokens")
        axes.set_ylabel(f"{mode}, ns per token and head")
        return png(figure)
