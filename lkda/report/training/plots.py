"""Plots of runs: loss against tokens, against wall-clock time, and against the size of the state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lkda.report.draw.curves import ENOUGH, Curve, mean_curve, running_mean
from lkda.report.draw.labels import BARS, Label, label_ends, label_points, mark_seeds
from lkda.report.draw.style import Look, Picture, Style, picture
from lkda.report.draw.units import count, memory
from lkda.report.read.groups import Group
from lkda.report.read.runs import Run

MOST_CURVES = 8  # that can be told apart in one plot
SIZE = (7.2, 4.3)  # inches, at 200 dots each; sharp at a README's width
NAMES = {
    "tokens": "training tokens",
    "seconds": "training time (s)",
    "val/loss": "loss (nats per token)",
    "val/bits_per_byte": "bits per byte",
    "test/loss": "loss (nats per token)",
    "test/bits_per_byte": "bits per byte",
}


def loss_curves(groups: Sequence[Group], *, x: str, y: str, bits_per_nat: float | None = None) -> Picture:
    """Loss against `x`: the mean over a group's seeds, in a band from the smallest to the largest.

    Args:
        x: tokens, or seconds as in `training_seconds`.
        y: val/loss or val/bits_per_byte.
        bits_per_nat: bits per byte for a loss of one nat per token. Adds a second scale at the right.
    """
    validations = [mean_curve(group.runs, x, y) for group in groups]
    curves = validations
    training = [running_mean(mean_curve(group.runs, x, y.replace("val", "train"))) for group in groups]
    by_training = min(len(curve.x) for curve in validations) < ENOUGH and all(curve.x for curve in training)
    if by_training:
        curves = training

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = []
        for group, curve, points, look in zip(groups, curves, validations, _looks(groups, style)):
            colour = look.colour
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.7, linestyle=look.line)
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(points.x, points.y, color=colour, marker=look.marker, markersize=4.5, linestyle="none")
            labels.append(Label(points.x[-1], points.y[-1], f"{group.label}  {points.y[-1]:.3f}", colour))
        axes.set_ylim(*_interesting(curves + validations))
        axes.set_xlim(left=0)
        axes.set_xlabel(NAMES[x])
        axes.set_ylabel(("training " if by_training else "validation ") + NAMES[y])
        axes.set_title(_legend(groups, by_training=by_training), fontsize=9, color=style.faint, loc="left")
        if bits_per_nat is not None:
            _second_scale(axes, bits_per_nat, style)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        label_ends(axes, labels)
        end = max(label.x for label in labels)
        axes.set_xticks([tick for tick in MaxNLocator(6).tick_values(0, end) if tick <= end])
        return figure

    return picture(draw)


def loss_by_position(groups: Sequence[Group], *, bits_per_nat: float | None = None) -> Picture | None:
    """The loss of the last validation by position in the context, or None where a run did not measure it.

    Each point is a range of positions, drawn at its middle on a log axis: the mean over a group's seeds, in a band from
    the smallest to the largest.

    Args:
        bits_per_nat: as in `loss_curves`.
    """
    found = [[_by_position(run) for run in group.runs] for group in groups]
    shared = set.intersection(*(set(losses) for runs in found for losses in runs))
    starts = sorted(shared)[2:]  # the first two tokens are equally hard for every model, and would stretch the axis
    if len(starts) < 2:
        return None
    context = groups[0].runs[0].summary["context"]
    middles = [math.sqrt(start * (min(2 * start, context) - 1)) for start in starts]

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = []
        for group, runs, look in zip(groups, found, _looks(groups, style)):
            losses = np.array([[losses[start] for start in starts] for losses in runs])
            mean = losses.mean(0)
            drawn: dict[str, Any] = {"color": look.colour, "linestyle": look.line, "marker": look.marker}
            axes.plot(middles, mean, linewidth=1.7, markersize=4.5, **drawn)
            axes.fill_between(middles, losses.min(0), losses.max(0), color=look.colour, alpha=0.18, linewidth=0)
            labels.append(Label(middles[-1], mean[-1], f"{group.label}  {mean[-1]:.3f}", look.colour))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([start for start in starts if start <= middles[-1]])
        axes.set_xlabel("position in the context (token)")
        axes.set_ylabel("validation " + NAMES["val/loss"])
        axes.set_title(_legend(groups), fontsize=9, color=style.faint, loc="left")
        if bits_per_nat is not None:
            _second_scale(axes, bits_per_nat, style)
        label_ends(axes, labels)
        return figure

    return picture(draw)


def _by_position(run: Run) -> dict[int, float]:
    """{first position of a range: the loss of the last validation there}"""
    head = "val/loss/from_"
    row = next(row for row in reversed(run.metrics) if "val/loss" in row)
    return {int(name.removeprefix(head)): loss for name, loss in row.items() if name.startswith(head)}


def loss_against_state(groups: Sequence[Group], *, y: str) -> Picture:
    """The final loss against the bytes of one sequence's state, with a bar from the best to the worst seed."""

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = [
            mark_seeds(axes, group.mean("state_bytes"), group.values(y), group.label, look)
            for group, look in zip(groups, _looks(groups, style))
        ]
        axes.set_xscale("log", base=2)
        axes.set_ylim(*_at_least(0.02, *axes.get_ylim()))
        exponents = [math.log2(label.x) for label in labels]
        middle, reach = (max(exponents) + min(exponents)) / 2, max(2.0, (max(exponents) - min(exponents)) * 0.65)
        axes.set_xlim(2 ** (middle - reach), 2 ** (middle + reach))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: memory(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("size of one sequence's state at the training context")
        axes.set_ylabel(("test " if y.startswith("test/") else "validation ") + NAMES[y])
        if any(len(group.runs) > 1 for group in groups):
            axes.set_title(BARS, fontsize=9, color=style.faint, loc="left")
        label_points(axes, labels)
        return figure

    return picture(draw)


def loss_by_model(groups: Sequence[Group], *, y: str) -> Picture | None:
    """The final loss of each row of the table, with a bar from the best to the worst seed: a line for each, the best
    on top. None for at most MOST_CURVES rows, which can be told apart in a plot of curves.

    A dashed line marks the model that most others are variants of, so that one sees what each change costs.
    """
    if len(groups) <= MOST_CURVES:
        return None
    ordered = sorted(groups, key=lambda group: group.mean(y))
    origin = _origin(ordered)

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(SIZE[0], 0.9 + 0.27 * len(ordered)), layout="constrained")
        axes = figure.add_subplot()
        for n, (group, look) in enumerate(zip(ordered, _looks(ordered, style), strict=True)):
            values, mean = group.values(y), group.mean(y)
            bar = [[mean - min(values)], [max(values) - mean]]
            colour = look.colour if group.label == group.mixer else style.text
            axes.errorbar(mean, n, xerr=bar, color=colour, marker="o", markersize=6, elinewidth=1.4, linestyle="none")
            axes.annotate(
                f"{mean:.3f}", (max(values), n), (8, 0), textcoords="offset points", va="center_baseline", fontsize=9
            )
        if origin is not None:
            axes.axvline(origin.mean(y), color=style.faint, linewidth=1, linestyle="--", zorder=0.9)
        axes.set_yticks(range(len(ordered)), [group.label for group in ordered])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high + 0.09 * (high - low))  # room for the last number
        axes.set_xlabel(("test " if y.startswith("test/") else "validation ") + NAMES[y])
        said = [f"Dashed: {origin.label}."] if origin is not None else []
        said += [BARS] if any(len(group.runs) > 1 for group in groups) else []
        axes.set_title(" ".join(said), fontsize=9, color=style.faint, loc="left")
        return figure

    return picture(draw)


def _origin(groups: Sequence[Group]) -> Group | None:
    """The model that most others are variants of: one of the same mixer whose label names no setting."""
    mixers = Counter(group.mixer for group in groups)
    plain = [group for group in groups if group.label == group.mixer and mixers[group.mixer] > 1]
    return max(plain, key=lambda group: mixers[group.mixer], default=None)


def _legend(groups: Sequence[Group], *, by_training: bool = False) -> str:
    """What lines, points and bands show."""
    several = any(len(group.runs) > 1 for group in groups)
    if not by_training:
        return "Lines: mean over the seeds. Bands: from the best to the worst seed." if several else ""
    if not several:
        return "Lines: training, smoothed. Points and numbers: validation."
    return (
        "Lines: training, smoothed, mean over the seeds. Bands: from the best to the worst seed.\n"
        "Points and numbers: validation, mean over the seeds."
    )


def _looks(groups: Sequence[Group], style: Style) -> list[Look]:
    return style.looks([group.mixer for group in groups], [group.label for group in groups])


def _at_least(share: float, low: float, high: float) -> tuple[float, float]:
    """Limits with some room around `low` and `high`, wide enough that a small difference looks small."""
    span = max(1.2 * (high - low), share * abs(high))
    middle = (low + high) / 2
    return middle - span / 2, middle + span / 2


def _interesting(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits that leave out the steep beginning: the top is the largest value after an eighth of the steps."""
    low = min(min(curve.low) for curve in curves)
    high = max(curve.high[len(curve.high) // 8] for curve in curves)
    room = 0.06 * max(high - low, 0.02 * abs(high))
    return low - room, high + room


def _second_scale(axes: Axes, bits_per_nat: float, style: Style) -> None:
    """Adds a scale in bits per byte at the right of an axis in nats per token."""
    scale = axes.secondary_yaxis(
        "right", functions=(lambda y: np.multiply(y, bits_per_nat), lambda y: np.divide(y, bits_per_nat))
    )
    scale.set_ylabel(NAMES["val/bits_per_byte"], color=style.faint)
    scale.tick_params(colors=style.faint, labelcolor=style.faint)
    scale.spines["right"].set_visible(False)
