"""Plots of a benchmark: time beside the memory lower bound, and cost per token against the sequence length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lkda.checks import InputError
from lkda.report.draw.labels import ABOVE_GRID, Label, label_ends
from lkda.report.draw.style import KNOWN, LINES, Picture, Style, occurrence_index, picture
from lkda.report.draw.units import count, length
from lkda.report.operators.benchmark import Row, device_times, implementation, measured, shape
from lkda.report.read.crossings import crossings as points_in_common

NUMBER = FuncFormatter(lambda value, _: f"{value:g}")
SOFTMAX = "softmax attention (SDPA)"  # an implementation that is measured beside KDA and is another function
REPLAYED = "Filled marks: replayed CUDA graphs. "
HOLLOW = "Hollow marks: eager calls, which include the time of the host."
# What tells curves of cost apart: operator, heads, implementation, gate, tokens.
Name = tuple[str, ...]


def subject(op: str, implementation: str) -> str:
    """What a colour stands for: a mixer, another operator, another library, or another backend of lkda."""
    if implementation == SOFTMAX:
        return "softmax"
    if implementation == "lkda cuda":
        mixer = op.partition("_")[0]
        return mixer if mixer in KNOWN else op
    library = implementation.partition(" ")[0]
    return implementation if library == "lkda" else library


def by_length(rows: Sequence[Row], *, mode: str, replay: str | None = None) -> dict[Name, list[tuple[int, float]]]:
    """Curves of time by length: (op, heads, implementation, gate, tokens) -> [(T, ns per token and head)].

    A curve has the same number of tokens B x T at each of its points, and at least two lengths.

    Args:
        replay: eager or graph times; where None, a curve is of graph times if these are at two lengths or more.
    """
    if replay is None:
        return by_length(rows, mode=mode, replay="eager") | by_length(rows, mode=mode, replay="graph")
    found: dict[Name, dict[int, float]] = defaultdict(dict)
    for row in measured(rows, mode=mode, replay=replay):
        tokens = row["B"] * row["T"]
        heads = f"{row['H']} heads of {row['D']}"
        gate = f"{row['gate']} decay" if row.get("gate") else ""
        name = (row["op"], heads, implementation(row), gate, f"{length(tokens)} tokens")
        found[name][row["T"]] = row["ms_median"] * 1e6 / (tokens * row["H"])
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def time_per_token_by_length(rows: Sequence[Row], *, mode: str) -> Picture:
    """Nanoseconds per token and head against T at a fixed B x T. It is flat where time is linear in the length.

    Lines are times of replayed graphs, or of eager calls where there are none; eager times have hollow marks.
    Raises: ValueError where the benchmark holds no times at several lengths for the same number of tokens.
    """
    curves, eager = by_length(rows, mode=mode), by_length(rows, mode=mode, replay="eager")
    if not curves:
        raise InputError(f"the benchmark has no {mode} times at several lengths to draw.")
    replayed = by_length(rows, mode=mode, replay="graph")
    subjects = [f"{op} {who}" if who.startswith("lkda ") else who for op, who in _subjects(curves)]
    texts = labels_of(list(curves))

    def draw(style: Style) -> Figure:
        figure, axes = _length_axes({T for points in curves.values() for T, _ in points})
        colours = style.colours(subjects)
        labels = []
        for name, who, occurrence in zip(curves, subjects, occurrence_index(subjects)):
            xs, ys = zip(*curves[name])
            line, colour = LINES[occurrence % len(LINES)], colours[who]
            axes.plot(xs, ys, color=colour, linestyle=line, linewidth=1.7)
            if name in replayed:
                axes.plot(xs, ys, "o", color=colour, markersize=4)
            if name in eager:
                axes.plot(*zip(*eager[name]), "o", color=colour, markersize=7, fillstyle="none")
            labels.append(Label(xs[-1], ys[-1], texts[name], colour))
        low, high = axes.get_ylim()
        if high < 4 * low:  # a difference of a few percent must look small
            axes.set_ylim((low * high) ** 0.5 / 2, (low * high) ** 0.5 * 2)
        _mark_crossings(axes, curves, style)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes.set_ylabel(f"{mode}, ns per token and head")
        if eager:
            axes.set_title((REPLAYED if replayed else "") + HOLLOW, fontsize=9, color=style.faint, loc="left")
        label_ends(axes, labels)
        return figure

    return picture(draw)


def _subjects(curves: Iterable[Name]) -> list[tuple[str, str]]:
    return [(op, subject(op, implementation)) for op, _, implementation, *_ in curves]


def _length_axes(ticks: Iterable[int]) -> tuple[Figure, Axes]:
    """A figure with a logarithmic axis of sequence lengths and a logarithmic vertical axis."""
    figure = Figure(figsize=(7.2, 4.3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sequence length T")
    return figure, axes


def labels_of(names: Sequence[Name]) -> dict[Name, str]:
    """What to write beside each curve: what it computes, and as much of the rest as distinguishes the curves."""
    said = [0, 2]  # operator and implementation
    for part in (1, 3, 4):
        if _distinct(names, [*said, part]) > _distinct(names, said):
            said.append(part)
    return {name: ", ".join(filter(None, [_function(name), *(name[part] for part in said[2:])])) for name in names}


def _function(name: Name) -> str:
    """The operator and its implementation; softmax attention is measured beside KDA, and is not KDA."""
    op, implementation = name[0], name[2]
    return implementation if implementation == SOFTMAX else f"{op}, {implementation}"


def _distinct(names: Iterable[Name], parts: Sequence[int]) -> int:
    return len({tuple(name[n] for n in parts) for name in names})


def _mark_crossings(axes: Axes, curves: dict[Name, list[tuple[int, float]]], style: Style) -> None:
    """A ring where softmax attention becomes slower than KDA, and its length in a free band above all curves."""
    bottom, top = axes.get_ylim()
    found = crossings(curves)
    axes.set_ylim(bottom, top * 1.5 ** len(found))
    for n, (T, cost) in enumerate(found):
        axes.plot(T, cost, "o", color=style.text, markersize=9, fillstyle="none")
        axes.annotate(
            f"softmax attention is slower from about T = {round(T, -2):,.0f}",
            (T, cost),
            (T, top * 1.5 ** (n + 0.5)),
            va="center",
            fontsize=8,
            zorder=ABOVE_GRID,
            bbox={"facecolor": style.background, "edgecolor": "none", "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": style.faint, "linewidth": 0.7, "relpos": (0, 0), "shrinkB": 5},
        )


def crossings(curves: dict[Name, list[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Where softmax attention's cost exceeds that of lkda's CUDA kernels: (T, cost), interpolated on log axes."""
    found = []
    for name, points in curves.items():
        op, heads, implementation, *rest = name
        softmax = curves.get((op, heads, SOFTMAX, *rest), [])
        if implementation == "lkda cuda":
            found += [(T, cost) for T, cost, above in points_in_common(softmax, points) if above]
    return found


CLAIMED_RATIO = 32  # KDA over simplified attention, according to the notes that this project began with


def over_simplified(rows: Sequence[Row], *, mode: str) -> dict[str, list[tuple[int, float]]]:
    """KDA's time over that of the simplified kernels at the same shape: label -> [(T, ratio)]."""
    times: dict[tuple[str, str], dict[str, Row]] = {}
    for row in device_times(rows, mode=mode):
        if row.get("backend") == "cuda":
            times.setdefault((shape(row), row["dtype"]), {})[f"{row['op']} {row.get('gate') or ''}"] = row
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for ops in times.values():
        simplified = ops.get("simplified ")
        for row in ops.values() if simplified else ():
            if row["op"] == "kda" and simplified:
                gate = f"{row['gate']} decay, " if row.get("gate") else ""
                name = f"{gate}{row['H']} heads of {row['D']}, {length(row['B'] * row['T'])} tokens"
                found[name].append((row["T"], row["ms_median"] / simplified["ms_median"]))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def ratio_by_length(rows: Sequence[Row], *, mode: str) -> Picture:
    """KDA's time over simplified attention's against T, beside the ratio that this project set out to check.

    Raises: ValueError where the benchmark does not hold both at several lengths.
    """
    curves = over_simplified(rows, mode=mode)
    if not curves:
        raise InputError(f"the benchmark has no {mode} times of both kda and simplified at several lengths.")
    ticks = sorted({T for points in curves.values() for T, _ in points})

    def draw(style: Style) -> Figure:
        figure, axes = _length_axes(ticks)
        labels = [Label(ticks[-1], CLAIMED_RATIO, f"{CLAIMED_RATIO}, from the original notes", style.text)]
        axes.plot([ticks[0], ticks[-1]], [CLAIMED_RATIO] * 2, color=style.text, linewidth=1.2, linestyle=LINES[1])
        for n, (name, points) in enumerate(curves.items()):
            colour = style.palette[n % len(style.palette)]
            axes.plot(*zip(*points), color=colour, marker="o", markersize=4, linewidth=1.7)
            labels.append(Label(*points[-1], name, colour))
        axes.yaxis.set_major_formatter(NUMBER)
        axes.set_ylim(min(1.0, *(ratio for points in curves.values() for _, ratio in points)), 50)
        axes.set_ylabel(f"{mode}, time of KDA / time of simplified")
        label_ends(axes, labels)
        return figure

    return picture(draw)
