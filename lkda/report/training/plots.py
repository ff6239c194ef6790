"""Plots of runs: loss against tokens, against wall-clock time, and against the bytes of the state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from lkda.report.draw.curves import Curve, mean_curve, running_mean
from lkda.report.draw.labels import Label, label_ends, label_points
from lkda.report.draw.style import LINES, MARKERS, Picture, Theme, picture, turns
from lkda.report.draw.units import count, memory
from lkda.report.read.groups import Group
from lkda.report.read.runs import Run

SIZE = (7.2, 4.3)  # inches, at 200 dots each; sharp at a README's width
NAMES = {
    "tokens": "training tokens",
    "seconds": "training time (s)",
    "val/loss": "loss (nats per token)",
    "val/bits_per_byte": "bits per byte",
    "test/loss": "loss (nats per token)",
    "test/bits_per_byte": "bits per byte",
}
# Below this many validations a run's course is told by its training loss, and the validations are points beside it.
ENOUGH = 4


def loss_curves(groups: Sequence[Group], *, x: str, y: str, bits_per_nat: float | None = None) -> Picture:
    """Loss against `x`, the mean of a group's seeds in a band from the least to the greatest.

    Args:
        x: tokens or seconds, columns of metrics.csv.
        y: val/loss or val/bits_per_byte.
        bits_per_nat: bits per byte for a loss of one nat per token; gives the picture a second scale, at the right.
    """
    validations = [mean_curve(group.runs, x, y) for group in groups]
    course = validations
    by_training = min(len(curve.x) for curve in validations) < ENOUGH
    if by_training:
        course = [running_mean(mean_curve(group.runs, x, y.replace("val", "train"))) for group in groups]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = []
        turn_of = turns([group.mixer for group in groups])
        for group, curve, points, turn, colour in zip(groups, course, validations, turn_of, _colours(groups, theme)):
            axes.plot(curve.x, curve.y, color=colour, linewidth=1.7, linestyle=LINES[turn % len(LINES)])
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
            marker = MARKERS[turn % len(MARKERS)]
            axes.plot(points.x, points.y, color=colour, marker=marker, markersize=4.5, linestyle="none")
            labels.append(Label(points.x[-1], points.y[-1], f"{group.label}  {points.y[-1]:.3f}", colour))
        axes.set_ylim(*_interesting(course + validations))
        axes.set_xlim(left=0)
        axes.set_xlabel(NAMES[x])
        axes.set_ylabel(("training " if by_training else "validation ") + NAMES[y])
        if by_training:
            axes.set_title(
                "Lines: training, smoothed. Points and numbers: validation.", fontsize=9, color=theme.faint, loc="left"
            )
        if bits_per_nat is not None:
            _second_scale(axes, bits_per_nat, theme)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        label_ends(axes, labels)
        end = max(label.x for label in labels)
        axes.set_xticks([tick for tick in MaxNLocator(6).tick_values(0, end) if tick <= end * 1.02])
        return figure

    return picture(draw)


def loss_by_position(groups: Sequence[Group], *, bits_per_nat: float | None = None) -> Picture | None:
    """The last validation's loss in each range of positions of the context, a point at the middle of the range on a log
    axis, the mean of a group's seeds in a band from the least to the greatest. None where a run has not measured it.

    Args:
        bits_per_nat: as in `loss_curves`.
    """
    found = [[_by_position(run) for run in group.runs] for group in groups]
    shared = set.intersection(*(set(losses) for runs in found for losses in runs))
    starts = sorted(shared)[2:]  # the first two tokens are as hard for every model, and harder than all that follow
    if len(starts) < 2:
        return None
    context = groups[0].runs[0].summary["context"]
    middles = [math.sqrt(start * (min(2 * start, context) - 1)) for start in starts]

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = []
        turn_of = turns([group.mixer for group in groups])
        for group, runs, turn, colour in zip(groups, found, turn_of, _colours(groups, theme)):
            losses = np.array([[losses[start] for start in starts] for losses in runs])
            mean = losses.mean(0)
            marker = MARKERS[turn % len(MARKERS)]
            axes.plot(
                middles,
                mean,
                color=colour,
                linewidth=1.7,
                linestyle=LINES[turn % len(LINES)],
                marker=marker,
                markersize=4.5,
            )
            axes.fill_between(middles, losses.min(0), losses.max(0), color=colour, alpha=0.18, linewidth=0)
            labels.append(Label(middles[-1], mean[-1], f"{group.label}  {mean[-1]:.3f}", colour))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([start for start in starts if start <= middles[-1]])
        axes.set_xlabel("position in the context (token)")
        axes.set_ylabel("validation " + NAMES["val/loss"])
        if bits_per_nat is not None:
            _second_scale(axes, bits_per_nat, theme)
        label_ends(axes, labels)
        return figure

    return picture(draw)


def _by_position(run: Run) -> dict[int, float]:
    """First position of a range -> the last validation's loss there."""
    head = "val/loss/from_"
    row = next(row for row in reversed(run.metrics) if "val/loss" in row)
    return {int(name.removeprefix(head)): loss for name, loss in row.items() if name.startswith(head)}


def loss_against_state(groups: Sequence[Group], *, y: str) -> Picture:
    """The final loss against the bytes of state a sequence, log axis; a bar from best to worst seed."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        labels = []
        turn_of = turns([group.mixer for group in groups])
        for group, turn, colour in zip(groups, turn_of, _colours(groups, theme)):
            values, mean, state = group.values(y), group.mean(y), group.mean("state_bytes")
            marker = MARKERS[turn % len(MARKERS)]
            bar = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(state, mean, bar, color=colour, marker=marker, markersize=8, elinewidth=1.4, capsize=0)
            labels.append(Label(state, mean, group.label, colour))
        axes.set_xscale("log", base=2)
        axes.set_ylim(*_at_least(0.02, *axes.get_ylim()))
        exponents = [math.log2(label.x) for label in labels]
        middle, reach = (max(exponents) + min(exponents)) / 2, max(2.0, (max(exponents) - min(exponents)) * 0.65)
        axes.set_xlim(2 ** (middle - reach), 2 ** (middle + reach))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: memory(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("state of one sequence at the training context")
        axes.set_ylabel(("test " if y.startswith("test/") else "validation ") + NAMES[y])
        if any(len(group.runs) > 1 for group in groups):
            axes.set_title("Bars: from the best to the worst seed.", fontsize=9, color=theme.faint, loc="left")
        label_points(axes, labels)
        return figure

    return picture(draw)


def _colours(groups: Sequence[Group], theme: Theme) -> list[str]:
    """The mixer's colour for each group; where all are of one mixer, another one for each but the first."""
    names = [group.mixer for group in groups]
    if len(set(names)) == 1:
        names[1:] = [group.label for group in groups[1:]]
    chosen = theme.colours(names)
    return [chosen[name] for name in names]


def _at_least(share: float, low: float, high: float) -> tuple[float, float]:
    """Limits with room around what lies between, and so wide that a small difference looks small."""
    span = max(1.2 * (high - low), share * abs(high))
    middle = (low + high) / 2
    return middle - span / 2, middle + span / 2


def _interesting(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits that leave out the first steep fall: the top is the highest curve's after an eighth of its steps."""
    low = min(min(curve.low) for curve in curves)
    high = max(curve.high[len(curve.high) // 8] for curve in curves)
    room = 0.06 * max(high - low, 0.02 * abs(high))
    return low - room, high + room


def _second_scale(axes: Axes, bits_per_nat: float, theme: Theme) -> None:
    """Bits per byte at the right of an axis in nats per token."""
    scale = axes.secondary_yaxis(
        "right", functions=(lambda y: np.multiply(y, bits_per_nat), lambda y: np.divide(y, bits_per_nat))
    )
    scale.set_ylabel(NAMES["val/bits_per_byte"], color=theme.faint)
    scale.tick_params(colors=theme.faint, labelcolor=theme.faint)
    scale.spines["right"].set_visible(False)
