"""Plots of runs: loss against tokens, against wall-clock time, and against the bytes of the state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lkda.report.runs import Group
from lkda.report.table import count, memory

# Okabe and Ito's colours, which most colour-blind readers tell apart. The mixers of this package keep theirs.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KNOWN = ("kda", "softmax", "simplified", "mla", "kda_mla_3to1", "kda_softmax_3to1")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.dpi": 160,
    "svg.hashsalt": "lkda",
}


def colours(groups: Sequence[Group]) -> dict[str, str]:
    """A colour for each group: the mixer's own where a mixer has one group, the palette in turn where not."""
    mixers = [group.mixer for group in groups]
    own = len(set(mixers)) == len(mixers)
    order = [*KNOWN, *(name for name in mixers if name not in KNOWN)] if own else [group.label for group in groups]
    keys = {group.label: group.mixer if own else group.label for group in groups}
    return {label: PALETTE[order.index(key) % len(PALETTE)] for label, key in keys.items()}


def loss_curves(groups: Sequence[Group], *, x: str, y: str) -> bytes:
    """PNG of validation loss (or bits per byte) against `tokens` or `seconds`; training loss faint behind it."""
    names = {"tokens": "training tokens", "seconds": "training time (s)"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        ends = []
        for group, colour in zip(groups, colours(groups).values()):
            for run in group.runs:
                axes.plot(*run.curve(x, y.replace("val", "train")), color=colour, alpha=0.22, linewidth=0.9)
                xs, ys = run.curve(x, y)
                axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o", markersize=3.5)
            ends.append((xs[-1], ys[-1], group.label, colour))
        _limit_to_the_interesting(axes, groups, x=x, y=y)
        _label_ends(axes, ends)
        axes.set_xlabel(names[x])
        axes.set_ylabel("bits per byte" if y.endswith("bits_per_byte") else "loss (nats per token)")
        axes.set_title("validation (points) and training (faint)", fontsize=9, color="#666666", loc="left")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
        return png(figure)


def loss_against_state(groups: Sequence[Group], *, y: str) -> bytes:
    """PNG of the final loss against the bytes of state a sequence, log axis; a bar from best to worst seed."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for group, colour in zip(groups, colours(groups).values()):
            values, state = group.values(y), group.values("state_bytes")[0]
            mean = sum(values) / len(values)
            axes.errorbar(
                state,
                mean,
                [[mean - min(values)], [max(values) - mean]],
                color=colour,
                marker="o",
                markersize=8,
                capsize=3,
            )
            axes.annotate(group.label, (state, mean), (9, 6), textcoords="offset points", color=colour, fontsize=9)
        axes.set_xscale("log", base=2)
        axes.margins(x=0.25, y=0.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: memory(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("state of one sequence at the training context")
        axes.set_ylabel("bits per byte" if y.endswith("bits_per_byte") else "validation loss (nats per token)")
        return png(figure)


def _limit_to_the_interesting(axes: Axes, groups: Sequence[Group], *, x: str, y: str) -> None:
    """Cuts off the first steep fall: the top of the picture is a little above the first validation."""
    curves = [run.curve(x, y)[1] for group in groups for run in group.runs]
    low, high = min(map(min, curves)), max(curve[0] for curve in curves)
    room = 0.08 * max(high - low, 0.05 * high)
    axes.set_ylim(low - room, high + 2 * room)
    axes.margins(x=0.02)


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Each curve's name at its end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.055
    placed: list[float] = []
    for x, y, label, colour in sorted(ends, key=lambda end: end[1]):
        height = max(y, placed[-1] + step) if placed else y
        placed.append(height)
        axes.annotate(label, (x, height), (6, 0), textcoords="offset points", color=colour, va="center", fontsize=9)
    right = max(end[0] for end in ends)
    axes.set_xlim(right=right * 1.26)
    axes.xaxis.set_major_locator(MaxNLocator(6))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
