"""A plot of accuracy against speed: of the training, and of each stage of a model at its longest context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lkda.report.draw.labels import BARS, Label, label_points, mark_seeds
from lkda.report.draw.style import Look, Picture, Style, picture
from lkda.report.draw.units import count, length
from lkda.report.read.groups import Group
from lkda.report.tradeoff.measurements import OF_MODELS, Measurement
from lkda.report.tradeoff.records import MeasuredSpeeds, Quality, by_data, measured_speeds, of_one_device

PANEL = (3.9, 3.1)  # inches
COLUMNS = 2


@dataclass(frozen=True)
class Panel:
    """The speeds in one setting.

    Attributes:
        title: the setting, in two lines.
        of: groups and their tokens/s.
    """

    title: str
    of: Sequence[tuple[Group, float]]


def accuracy_by_speed(
    groups: Sequence[Group], found: Sequence[Measurement], quality: Quality, *, exclusive_device: bool
) -> Picture | None:
    """Accuracy against tokens/s: a panel for the training, and one for each stage that was measured.

    A point is the mean over a group's seeds, and its bar reaches from the best to the worst. None for runs of
    different data, and without benchmarks of at least two of the models.

    Args:
        found: benchmarks of models. Of each stage the setting with most of the models is drawn, at its longest context.
        exclusive_device: whether no run shared its device, so that the speeds of the training can be compared.
    """
    measured = _longest(measured_speeds(groups, found))
    if not measured or len(by_data(groups)) > 1:
        return None
    panels = [*(_logged(groups) if exclusive_device else []), *measured]

    def draw(style: Style) -> Figure:
        columns = min(COLUMNS, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        looks = style.looks([group.mixer for group in groups], [group.label for group in groups])
        of_group = {id(group): look for group, look in zip(groups, looks, strict=True)}
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        labels = [_points(axes, panel, of_group, quality, style) for axes, panel in zip(grid.flat, panels)]
        better = "Higher" if quality.more_is_better else "Lower"
        bars = f" {BARS}" if any(len(group.runs) > 1 for group in groups) else ""
        figure.suptitle(f"{better} is more accurate, farther right is faster.{bars}", fontsize=9, color=style.faint)
        for axes in grid[:, 0]:
            axes.set_ylabel(quality.title)
        for axes, written in zip(grid.flat, labels):  # when the limits are final
            label_points(axes, written)
        return figure

    return picture(draw)


def _logged(groups: Sequence[Group]) -> list[Panel]:
    """The panel of the training, if all runs had the same kind of device."""
    if not of_one_device(groups):
        return []
    contexts = {int(run.summary.get("context") or 0) for group in groups for run in group.runs}
    of = f", rows of {length(next(iter(contexts)))} tokens" if len(contexts) == 1 and 0 not in contexts else ""
    return [Panel(f"training{of}\nas the runs logged it", [(one, one.mean("tokens_per_s")) for one in groups])]


def _longest(measured: Sequence[MeasuredSpeeds]) -> list[Panel]:
    """Of each stage the setting with most of the models, at its longest context."""
    of_stages = [[one for one in measured if one.stage == stage] for stage in OF_MODELS]
    chosen = [max(found, key=lambda one: (len(one.of), one.context)) for found in of_stages if found]
    return [Panel(f"{one.stage}, {_of_context(one)}\n{where}", one.of) for one, where in _different(chosen)]


def _of_context(one: MeasuredSpeeds) -> str:
    what = {"training step": "rows of {} tokens", "prefill": "a prompt of {} tokens", "decode": "after {} tokens"}
    return what[one.stage].format(length(one.context))


def _different(chosen: Sequence[MeasuredSpeeds]) -> list[tuple[MeasuredSpeeds, str]]:
    """Each with the parts of `where` that not all of them have: the model and the device are mostly those of all."""
    parts = [one.where.split(", ") for one in chosen]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [(one, ", ".join(part for part in of if part not in shared)) for one, of in zip(chosen, parts, strict=True)]


def _points(axes: Axes, panel: Panel, looks: dict[int, Look], quality: Quality, style: Style) -> list[Label]:
    """Draws the points of a panel, and returns their labels."""
    labels = [
        mark_seeds(axes, speed, group.values(quality.key), group.label, looks[id(group)]) for group, speed in panel.of
    ]
    axes.set_title(panel.title, fontsize=9, color=style.text, loc="left")
    axes.set_xscale("log")
    speeds = [speed for _, speed in panel.of]
    middle, reach = math.log(max(speeds) * min(speeds)) / 2, max(0.2, 0.65 * math.log(max(speeds) / min(speeds)))
    axes.set_xlim(math.exp(middle - reach), math.exp(middle + reach))
    wide = max(speeds) > 3 * min(speeds)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)) if wide else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel("tokens/s")
    axes.margins(y=0.12)
    return labels
