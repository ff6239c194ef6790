"""Plots of synthetic tasks: accuracy against the size of the state by subset, and against length by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from lkda.report.draw.style import MARKERS, Picture, Style, picture
from lkda.report.draw.units import length, memory
from lkda.report.training.accuracy import Line, Point, describe

COLUMNS = 4
WIDTH, HEIGHT = 2.35, 2.2  # of a panel, in inches
# Of the first and of the last line, in points. A later line is drawn over the earlier ones, which show around it where
# both have the same accuracy.
MARKER_SIZES, LINE_WIDTHS = (7.0, 4.0), (2.6, 1.3)


def by_state(lines: Sequence[Line]) -> Picture | None:
    """A panel for each subset of the validation and a line for each mixer, whose points are its widths.

    None where no task has states of several sizes.
    """
    subsets = sorted({point.subset for line in lines for point in line.points})
    if not any(
        len({p.state_bytes for p in line.points if p.subset == subset}) > 1 for line in lines for subset in subsets
    ):
        return None

    states = [point.state_bytes for line in lines for point in line.points]
    low, high = math.log2(min(states)), math.log2(max(states))

    def panel(axes: Axes, subset: object) -> None:
        axes.set_title(describe(subset), fontsize=9)  # type: ignore[arg-type]
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([4.0**n for n in range(math.ceil(low / 2), math.floor(high / 2) + 1)])
        axes.set_xlim(2 ** (low - 0.7), 2 ** (high + 0.7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: memory(value)))
        axes.tick_params(axis="x", labelrotation=30)

    def points(line: Line, subset: object) -> list[tuple[float, Point]]:
        return [(p.state_bytes, p) for p in line.points if p.subset == subset]

    return _panels(lines, subsets, panel, points, x="size of one sequence's state")


def by_length(lines: Sequence[Line]) -> Picture | None:
    """A panel for each task whose subsets differ only in length, each model at the length that it was trained at.

    None where there is no such task with several lengths.
    """
    found: dict[str, set[int]] = {}
    for line in lines:
        for point in line.points:
            if len(point.subset) == 1:
                found.setdefault(point.task, set()).add(dict(point.subset)["length"])
    tasks = [task for task, lengths in found.items() if len(lengths) > 1]
    if not tasks:
        return None

    def panel(axes: Axes, task: object) -> None:
        axes.set_title(str(task), fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(found[str(task)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
        axes.xaxis.set_minor_locator(NullLocator())

    def points(line: Line, task: object) -> list[tuple[float, Point]]:
        own = [p for p in line.points if p.task == task]
        trained_there = [p for p in own if dict(p.subset)["length"] == p.context]
        return [(dict(p.subset)["length"], p) for p in trained_there]

    return _panels(lines, tasks, panel, points, x="length in tokens, of training and of validation")


def _panels(
    lines: Sequence[Line],
    cells: Sequence[object],
    panel: Callable[[Axes, object], None],
    points: Callable[[Line, object], Iterable[tuple[float, Point]]],
    *,
    x: str,
) -> Picture:
    """A panel for each cell, in rows of COLUMNS, with the legend in the place after the last panel."""

    def draw(style: Style) -> Figure:
        columns = min(COLUMNS, len(cells) + 1)
        rows = -(-(len(cells) + 1) // columns)
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        sizes = np.linspace(*MARKER_SIZES, len(lines)), np.linspace(*LINE_WIDTHS, len(lines))
        chosen = style.looks([line.mixer for line in lines], [line.label for line in lines])
        looks: list[dict[str, Any]] = [
            {"color": look.colour, "linestyle": look.line, "marker": MARKERS[n % len(MARKERS)]}
            | {"markersize": marker, "linewidth": width}
            for n, (look, marker, width) in enumerate(zip(chosen, *sizes, strict=True))
        ]
        for axes, cell in zip(grid, cells, strict=False):
            panel(axes, cell)
            for line, look in zip(lines, looks, strict=True):
                found = sorted(points(line, cell), key=lambda pair: pair[0])
                axes.plot([at for at, _ in found], [p.accuracy for _, p in found], **look)
                axes.vlines(
                    [at for at, _ in found], [p.low for _, p in found], [p.high for _, p in found], look["color"]
                )
            axes.set_ylim(-0.06, 1.06)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.tick_params(labelsize=7.5)
        for axes in grid[len(cells) :]:
            axes.axis("off")
        names = grid[len(cells)]
        handles = [names.plot([], [], label=line.label, **look)[0] for line, look in zip(lines, looks, strict=True)]
        names.legend(handles=handles, loc="center left", frameon=False, fontsize=8.5)
        figure.supxlabel(x, fontsize=9)
        figure.supylabel("accuracy at the target positions", fontsize=9)
        return figure

    return picture(draw)
