"""Plots of a benchmark's times: a grid of panels, one for each operator, shape, dtype and decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lkda.report.draw.style import Picture, Style, picture
from lkda.report.draw.units import three
from lkda.report.operators.benchmark import Row, device_times, implementation, measured, shape
from lkda.report.operators.plots import subject

# Of a grid in one picture; what is more becomes further pictures.
MOST_COLUMNS, MOST_ROWS = 3, 8
COLUMN_WIDTH, LINE_HEIGHT = 5.2, 0.21  # inches
FONT_SIZE = 8


class Panel:
    """The times of one operator at one shape, dtype and decay.

    Attributes:
        regime: operator, dtype and decay, in words. shape: B x T x H x D.
        lines: for each implementation, fastest first, its row of the replayed graph and its eager row; None for what
            was not measured.
    """

    def __init__(self, rows: Sequence[Row], eager: Sequence[Row]) -> None:
        self.regime, self.shape = regime(rows[0]), shape(rows[0])
        called = {implementation(row): row for row in eager}
        self.lines: list[tuple[Row | None, Row | None]] = [
            (row if row["replay"] == "graph" else None, called.get(implementation(row)))
            for row in sorted(rows, key=lambda row: row["ms_median"])
        ]

    @property
    def title(self) -> str:
        return f"{self.regime}, {self.shape}"


Cells = list[list[Panel | None]]  # of a grid, row by row


def regime(row: Row) -> str:
    """As "kda, bf16, slow decay"."""
    gate = f"{row['gate']} decay" if row.get("gate") else ""
    return ", ".join(filter(None, (row["op"], row["dtype"], gate)))


def pages(rows: Sequence[Row], *, mode: str) -> list[Cells]:
    """The panels of one mode in grids that fit on a screen; none where the benchmark has no times in that mode.

    Two or three regimes are the columns and shapes the rows, or the other way around; else panels follow one another.
    """
    times, eager = defaultdict(list), defaultdict(list)
    for row in sorted(device_times(rows, mode=mode), key=lambda row: (row["D"], row["H"], row["T"], row["B"])):
        times[regime(row), shape(row)].append(row)
    for row in measured(rows, mode=mode, replay="eager"):
        eager[regime(row), shape(row)].append(row)
    panels = {key: Panel(found, eager[key]) for key, found in times.items()}
    regimes = list(dict.fromkeys(regime(row) for row in rows if (regime(row), shape(row)) in panels))
    shapes = list(dict.fromkeys(shape for _, shape in panels))
    if 1 < len(regimes) <= MOST_COLUMNS:
        cells = [[panels.get((column, line)) for column in regimes] for line in shapes]
    elif 1 < len(shapes) <= MOST_COLUMNS:
        cells = [[panels.get((line, column)) for column in shapes] for line in regimes]
    else:
        columns = min(MOST_COLUMNS, -(-len(panels) // MOST_ROWS)) or 1
        flat = [*panels.values(), *[None] * (-len(panels) % columns)]
        cells = [flat[n : n + columns] for n in range(0, len(flat), columns)]
    return [cells[n : n + MOST_ROWS] for n in range(0, len(cells), MOST_ROWS)]


def times(cells: Cells, *, mode: str) -> Picture:
    """The times of a grid's panels on one logarithmic axis: the replayed graph, filled, and the eager call, hollow.

    The numbers at the right are milliseconds and the ratio to the memory lower bound, of the graph where there is one.
    A noisy measurement has a bar from its 20th to its 80th percentile.
    """
    panels = [panel for line in cells for panel in line if panel]
    subjects = [subject(row["op"], implementation(row)) for panel in panels for row in _rows(panel)]
    heights = [max(len(panel.lines) for panel in line if panel) + 2.4 for line in cells]

    def draw(style: Style) -> Figure:
        size = COLUMN_WIDTH * len(cells[0]), LINE_HEIGHT * sum(heights) + 0.9
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(cells), len(cells[0]), sharex=True, squeeze=False, height_ratios=heights)
        colours = style.colours(subjects)
        for axes, panel in zip(grid.flat, (panel for line in cells for panel in line)):
            if panel is None:
                axes.set_axis_off()
            else:
                _draw_panel(axes, panel, colours, style)
        last = grid[-1, 0]
        last.set_xscale("log")
        low, high = last.get_xlim()
        last.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        last.xaxis.set_minor_formatter(NullFormatter())
        for axes in grid[-1]:
            axes.set_xlabel(f"{mode}, ms", fontsize=FONT_SIZE)
        _legend(figure, panels, style)
        return figure

    return picture(draw)


def _rows(panel: Panel) -> list[Row]:
    """The row that gives an implementation its number: the graph's, or else the eager one."""
    return [graph or eager for graph, eager in panel.lines if graph or eager]  # type: ignore[misc]


def _draw_panel(axes: Axes, panel: Panel, colours: dict[str, str], style: Style) -> None:
    axes.set_title(panel.title, fontsize=FONT_SIZE + 1, loc="left", pad=4, color=style.text)
    names = []
    for n, ((graph, eager), row) in enumerate(zip(panel.lines, _rows(panel))):
        names.append(implementation(row))
        colour = colours[subject(row["op"], names[-1])]
        for found, face in ((eager, style.background), (graph, colour)):
            if found is not None:
                if found.get("noisy"):
                    axes.plot([found["ms_p20"], found["ms_p80"]], [n, n], "|-", color=colour, linewidth=1, markersize=5)
                axes.plot(found["ms_median"], n, "o", color=colour, markersize=5, markerfacecolor=face)
        axes.annotate(_number(row), (1.02, n), xycoords=("axes fraction", "data"), va="center", fontsize=FONT_SIZE)
    bound = panel.lines and _rows(panel)[0].get("lower_bound_ms")
    if bound:
        axes.plot([bound] * 2, [-0.4, len(names) - 0.6], color=style.text, linewidth=1.4)
    axes.set_yticks(range(len(names)), names, fontsize=FONT_SIZE)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=FONT_SIZE, length=2, which="both")


def _number(row: Row) -> str:
    """As "0.677 ms  3.5x", with what is to be known of the measurement."""
    over = f"  {three(row['ms_median'] / row['lower_bound_ms'])}x" if row.get("lower_bound_ms") else ""
    remarks = [*(["eager"] if row["replay"] == "eager" else []), *(["noisy"] if row.get("noisy") else [])]
    return f"{three(row['ms_median'])} ms{over}" + (f"  {', '.join(remarks)}" if remarks else "")


def _legend(figure: Figure, panels: Sequence[Panel], style: Style) -> None:
    """Explains the marks that occur."""
    found = [row for panel in panels for line in panel.lines for row in line if row]
    handles: dict[str, Line2D] = {}

    def mark(label: str, marker: str, size: float, *, face: str = style.text, line: str = "none") -> None:
        look: dict[str, Any] = {"color": style.text, "markerfacecolor": face, "linestyle": line}
        handles[label] = Line2D([], [], marker=marker, markersize=size, linewidth=1, **look)

    if any(row["replay"] == "graph" for row in found):
        mark("replayed CUDA graph: the device's time", "o", 5)
    if any(row["replay"] == "eager" for row in found):
        mark("eager call: with the host's time", "o", 5, face=style.background)
    if any(row.get("noisy") for row in found):
        mark("20th to 80th percentile, noisy", "|", 6, line="-")
    if any(row.get("lower_bound_ms") for row in found):
        mark("memory lower bound; x: ratio to it", "|", 10)
    columns = len(handles) if figure.get_figwidth() > 2 * COLUMN_WIDTH - 1 else 2
    layout: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": FONT_SIZE}
    figure.legend(handles.values(), handles, loc="outside lower center", **layout)
