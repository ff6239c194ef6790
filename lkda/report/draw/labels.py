"""Labels beside curves and points, used instead of a legend. They do not overlap, and grid lines end at them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox

from lkda.report.draw.style import Look

BARS = "Bars: from the best to the worst seed."  # of `mark_seeds`
SIZE = 9.0  # typographic points
ABOVE_GRID = 0.7  # grid lines have 0.5 and curves 2
# Mean width and height of a character of the default font, relative to its size.
WIDTH, HEIGHT = 0.6, 1.45
# The labels take at most this share of the width of the axes. Longer ones make the figure wider.
MOST_ROOM = 0.6
# Where a label is placed relative to its point: (right or left, above or below), in order of preference.
SIDES = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1), (1, 2), (1, -2), (-1, 2), (-1, -2))


@dataclass(frozen=True)
class Label:
    """A text for the point (x, y) of the data.

    Attributes:
        low, high: the ends of the point's error bar, where it has one.
    """

    x: float
    y: float
    text: str
    colour: str
    low: float | None = None
    high: float | None = None


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes the labels of the ends of curves as a column at the right, each joined to its end by a thin line.

    Makes room for the column by moving the right limit, and makes the figure wider for long labels. The grid lines end
    where the column begins. Call it after everything else, when the scales and the other limits are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # computes the width of the axes
    room = max(len(label.text) for label in labels) * WIDTH * SIZE / 72 + 0.3  # inches
    missing = room / MOST_ROOM - axes.get_window_extent().width / figure.dpi
    if missing > 0:
        figure.set_figwidth(figure.get_figwidth() + missing)
        figure.draw_without_rendering()
    box = axes.get_window_extent()
    width, height = box.width / figure.dpi, box.height / figure.dpi  # inches
    share = room / width
    scale = axes.xaxis.get_transform()
    left, end = scale.transform([axes.get_xlim()[0], max(label.x for label in labels)])
    axes.spines["bottom"].set_bounds(axes.get_xlim()[0], max(label.x for label in labels))
    axes.set_xlim(right=float(scale.inverted().transform(left + (end - left) / (1 - share))))
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {label: to_axes.transform((label.x, label.y)) for label in labels}
    ordered = sorted(labels, key=lambda label: ends[label][1])
    column = 1 - share + 0.2 / width
    room_behind = Rectangle(
        (1 - share + 0.03 / width, 0), share, 1, transform=axes.transAxes, color=axes.get_facecolor(), zorder=ABOVE_GRID
    )
    axes.add_patch(room_behind)
    axes.xaxis.label.set_x((1 - share) / 2)
    heights = spread([ends[label][1] for label in ordered], gap=SIZE * HEIGHT / 72 / height, low=0.03)
    for label, y in zip(ordered, heights):
        x, from_y = ends[label]
        inside, colour = axes.transAxes, label.colour
        axes.plot([x, column], [from_y, y], color=colour, linewidth=0.7, alpha=0.6, transform=inside, zorder=1.5)
        x = column + 0.04 / width
        axes.text(x, y, label.text, color=colour, va="center_baseline", fontsize=SIZE, transform=inside)


def spread(heights: Sequence[float], *, gap: float, low: float = -math.inf) -> list[float]:
    """Moves ascending heights as little as possible, so that they are at least `gap` apart and not below `low`.

    Neighbours that are too close form a block around their mean, and blocks that touch are joined.
    """

    def bottom(block: list[float]) -> float:
        return max(low, sum(block) / len(block) - gap * (len(block) - 1) / 2)

    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and bottom(blocks[-1]) < bottom(blocks[-2]) + len(blocks[-2]) * gap:
            last = blocks.pop()
            blocks[-1] += last
    return [bottom(block) + n * gap for block in blocks for n in range(len(block))]


def mark_seeds(axes: Axes, x: float, values: Sequence[float], text: str, look: Look) -> Label:
    """Draws the mean over seeds as a point, with a bar from the smallest to the largest value. Returns its label."""
    mean, low, high = statistics.fmean(values), min(values), max(values)
    bar = [[mean - low], [high - mean]]
    axes.errorbar(x, mean, bar, color=look.colour, marker=look.marker, markersize=8, elinewidth=1.4, linestyle="none")
    return Label(x, mean, text, look.colour, low=low, high=high)


def label_points(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label beside its point, on the side where it covers least of the points, bars and other labels.

    Call it when the limits are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = [tuple(axes.transData.transform((label.x, label.y))) for label in labels]
    taken = [Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in points]
    taken += [_bar(axes, label, scale) for label in labels]
    inside = axes.get_window_extent()
    for label, point in zip(labels, points):
        boxes = [_box(label.text, point, side, scale) for side in SIDES]
        covered = [_covered(box, taken, inside) for box in boxes]
        best = covered.index(min(covered))
        taken.append(boxes[best])
        axes.annotate(
            label.text,
            (label.x, label.y),
            _offset(SIDES[best]),
            textcoords="offset points",
            color=label.colour,
            ha=("right", "center", "left")[SIDES[best][0] + 1],
            va="center_baseline",
            fontsize=SIZE,
            zorder=ABOVE_GRID,
            bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5},
        )


def _bar(axes: Axes, label: Label, scale: float) -> Bbox:
    """The error bar of a label's point, in pixels; of no height where it has none."""
    low, high = label.y if label.low is None else label.low, label.y if label.high is None else label.high
    (x, low), (_, high) = axes.transData.transform([(label.x, low), (label.x, high)])
    return Bbox.from_bounds(x - 3 * scale, low, 6 * scale, high - low)


def _box(text: str, point: tuple[float, float], side: tuple[int, int], scale: float) -> Bbox:
    """The box that the text would cover at that side of the point. Pixels; `scale` of them are a typographic point."""
    width, height = len(text) * WIDTH * SIZE * scale, SIZE * HEIGHT * scale
    right, up = _offset(side)
    left = point[0] + right * scale + (side[0] - 1) * width / 2
    return Bbox.from_bounds(left, point[1] + up * scale - height / 2, width, height)


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """The area of other boxes under this one, plus three times its area outside the axes."""
    return sum(_area(box, other) for other in taken) + 3 * (box.width * box.height - _area(box, inside))


def _offset(side: tuple[int, int]) -> tuple[float, float]:
    """The offset in typographic points from the marker to the anchor of a label at this side."""
    right, up = side
    return 9.0 * right, up * (7.5 if right else 13.0)


def _area(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
