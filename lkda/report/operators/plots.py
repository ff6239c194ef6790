"""Plots of a benchmark: time against the floor, and the cost of a token against the length."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lkda.checks import InputError
from lkda.report.draw.labels import Label, label_ends
from lkda.report.draw.style import LINES, Picture, Theme, picture, turns
from lkda.report.draw.units import count, length, three
from lkda.report.operators.benchmark import Row, implementation, measured, shape

NUMBER = FuncFormatter(lambda value, _: f"{value:g}")


def times(rows: Sequence[Row], *, mode: str) -> Picture:
    """Eager time of every implementation at every shape, log axis; a line from the floor of that shape to each.

    Raises: ValueError where the benchmark holds no time in that mode.
    """
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in measured(rows, mode=mode):
        panels["  ".join(filter(None, (row["op"], shape(row), row["dtype"], row.get("gate"))))].append(row)
    if not panels:
        raise InputError(f"the benchmark has no eager {mode} time to draw.")
    heights = [len(panel) + 1.3 for panel in panels.values()]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.2, 0.23 * sum(heights) + 0.6), layout="constrained")
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (title, panel) in zip(every, panels.items()):
            axes.set_title(title, fontsize=9, loc="left", pad=2, color=theme.text)
            _panel(axes, sorted(panel, key=lambda row: row["ms_median"]), theme)
        last = every[-1]
        last.set_xscale("log")
        # Room for the numbers beside the last point.
        low, high = last.get_xlim()
        last.set_xlim(low, high * (high / low) ** 0.16)
        last.xaxis.set_major_formatter(NUMBER)
        last.xaxis.set_minor_formatter(NullFormatter())
        last.spines["bottom"].set_visible(True)
        last.tick_params(axis="x", length=3)
        last.set_xlabel(f"{mode}, ms, and times the floor (the vertical line)")
        return figure

    return picture(draw)


def _panel(axes: Axes, rows: Sequence[Row], theme: Theme) -> None:
    """One shape: a line each, fastest first; our own in the first colour, peers in the second."""
    floors = [row["floor_ms"] for row in rows if row.get("floor_ms")]
    start = min([*floors, *(row["ms_median"] for row in rows)])
    for n, row in enumerate(rows):
        colour, ms = theme.palette[1 if row.get("peer") else 0], row["ms_median"]
        axes.plot([start, ms], [n, n], color=colour, linewidth=1.2, alpha=0.45)
        axes.plot(ms, n, "o", color=colour, markersize=5)
        over = f"   {three(ms / row['floor_ms'])}x" if row.get("floor_ms") else ""
        axes.annotate(f"{three(ms)}{over}", (ms, n), (7, 0), textcoords="offset points", va="center", fontsize=8)
    if floors:
        axes.plot([floors[0]] * 2, [-0.4, len(rows) - 0.6], color=theme.text, linewidth=1.4)
    axes.set_yticks(range(len(rows)), [implementation(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, which="both")


def by_length(rows: Sequence[Row], *, mode: str) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """The curves of cost by length: (op, heads, implementation, gate, tokens) -> [(T, ns per token and head)].

    Of one number of tokens B x T each, and of two lengths or more.
    """
    found: dict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for row in measured(rows, mode=mode):
        tokens = row["B"] * row["T"]
        heads = f"{row['H']}x{row['D']}"
        name = (row["op"], heads, implementation(row), row.get("gate") or "", f"{length(tokens)} tokens")
        found[name][row["T"]] = row["ms_median"] * 1e6 / (tokens * row["H"])
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def cost_by_length(rows: Sequence[Row], *, mode: str) -> Picture:
    """Nanoseconds a token and head against T at a fixed B x T, eager: flat where time is linear in the length.

    Raises: ValueError where the benchmark holds no times at several lengths for the same number of tokens.
    """
    curves = by_length(rows, mode=mode)
    if not curves:
        raise InputError(f"the benchmark has no {mode} times at several lengths to draw.")
    telling: list[int] = []
    for part in range(5):  # a label says no more than it takes to tell the curves apart
        if _distinct(curves, [*telling, part]) > _distinct(curves, telling):
            telling.append(part)
    ops = [name[0] for name in curves]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.2, 4.3), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        colours = theme.colours(ops)
        labels = []
        for (name, points), turn in zip(curves.items(), turns(ops)):
            xs, ys = zip(*points)
            line, colour = LINES[turn % len(LINES)], colours[name[0]]
            axes.plot(xs, ys, color=colour, linestyle=line, marker="o", markersize=4, linewidth=1.7)
            text = " ".join(filter(None, (name[n] for n in telling or [0])))
            labels.append(Label(xs[-1], ys[-1], text, colour))
        for T, cost in crossings(curves):
            axes.plot(T, cost, "o", color=theme.text, markersize=8, fillstyle="none")
            said = f"T = {length(round(T))}"
            axes.annotate(said, (T, cost), (0, -14), textcoords="offset points", ha="center", fontsize=8)
        axes.xaxis.set_major_locator(FixedLocator(sorted({x for points in curves.values() for x, _ in points})))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("sequence length T")
        axes.set_ylabel(f"{mode}, ns per token and head")
        label_ends(axes, labels)
        return figure

    return picture(draw)


def crossings(curves: dict[tuple[str, ...], list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Where softmax attention's cost overtakes our kernel's: (T, cost), read between lengths on logarithmic axes."""
    found = []
    for name, points in curves.items():
        _, heads, implementation, *rest = name
        softmax = dict(curves.get((name[0], heads, "sdpa", *rest), ()))
        if implementation != "lkda cuda" or not softmax:
            continue
        both = [(math.log(T), math.log(cost), math.log(softmax[T])) for T, cost in points if T in softmax]
        for (T0, ours0, theirs0), (T1, ours1, theirs1) in zip(both, both[1:]):
            if theirs0 <= ours0 and theirs1 > ours1:
                part = (ours0 - theirs0) / ((theirs1 - theirs0) - (ours1 - ours0))
                found.append((math.exp(T0 + part * (T1 - T0)), math.exp(ours0 + part * (ours1 - ours0))))
    return found


ORIGIN = 32  # times slower than the simplified kernel: the claim that this project set out to test


def over_simplified(rows: Sequence[Row], *, mode: str) -> dict[str, list[tuple[int, float]]]:
    """KDA's time over the simplified kernel's at the same shape, by gate and number of tokens: name -> [(T, ratio)]."""
    times: dict[tuple[str, str], dict[str, Row]] = {}
    for row in measured(rows, mode=mode):
        if row.get("backend") == "cuda":
            times.setdefault((shape(row), row["dtype"]), {})[f"{row['op']} {row.get('gate') or ''}"] = row
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for ops in times.values():
        simplified = ops.get("simplified ")
        for row in ops.values() if simplified else ():
            if row["op"] == "kda" and simplified:
                name = f"{row.get('gate') or ''} {row['H']}x{row['D']}, {length(row['B'] * row['T'])} tokens"
                found[name.strip()].append((row["T"], row["ms_median"] / simplified["ms_median"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def ratio_by_length(rows: Sequence[Row], *, mode: str) -> Picture:
    """KDA over simplified against T, beside the 32 that the project's origin measured.

    Raises: ValueError where the benchmark does not hold both at several lengths.
    """
    curves = over_simplified(rows, mode=mode)
    if not curves:
        raise InputError(f"the benchmark has no {mode} times of both kda and simplified at several lengths.")

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(7.2, 3.8), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({T for points in curves.values() for T, _ in points})
        labels = [Label(ticks[-1], ORIGIN, "the origin's claim", theme.text)]
        axes.plot([ticks[0], ticks[-1]], [ORIGIN, ORIGIN], color=theme.text, linewidth=1.2, linestyle=LINES[1])
        for n, (name, points) in enumerate(curves.items()):
            colour = theme.palette[n % len(theme.palette)]
            axes.plot(*zip(*points), color=colour, marker="o", markersize=4, linewidth=1.7)
            labels.append(Label(*points[-1], name, colour))
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(NUMBER)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=1)
        axes.set_xlabel("sequence length T")
        axes.set_ylabel(f"{mode}, KDA over simplified, times")
        label_ends(axes, labels)
        return figure

    return picture(draw)


def _distinct(names: Iterable[tuple[str, ...]], parts: Sequence[int]) -> int:
    return len({tuple(name[n] for n in parts) for name in names})
