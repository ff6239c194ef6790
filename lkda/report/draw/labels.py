"""Names written beside what they name, without overlaps, in the place of a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

SIZE = 9.0  # points
# Of the default font, as parts of its size.
WIDTH, HEIGHT = 0.6, 1.45
# Of the width of a picture, at most for names beside the curves; it becomes wider for longer ones.
MOST_ROOM = 0.6
# Right or left (1, -1) and above or below of a point, the preferred first.
SIDES = ((1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1))


@dataclass(frozen=True)
class Label:
    """A name for the point (x, y) of the data."""

    x: float
    y: float
    text: str
    colour: str


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes the labels of curves' ends as a column at the right, each tied to its end by a hairline.

    Makes room for the column by moving the right limit, and a wider figure where names are long. Call it when the
    other limits and the scales are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # the layout decides how wide the axes are
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
    heights = spread([ends[label][1] for label in ordered], gap=SIZE * HEIGHT / 72 / height, low=0.03)
    for label, y in zip(ordered, heights):
        x, from_y = ends[label]
        inside, colour = axes.transAxes, label.colour
        axes.plot([x, column], [from_y, y], color=colour, linewidth=0.7, alpha=0.6, transform=inside)
        x = column + 0.04 / width
        axes.text(x, y, label.text, color=colour, va="center_baseline", fontsize=SIZE, transform=inside)


def spread(heights: Sequence[float], *, gap: float, low: float = -math.inf) -> list[float]:
    """Ascending heights, moved as little as it takes to lie at least `gap` apart and not under `low`.

    Neighbours that are too close become one block around their mean, and blocks that meet become one.
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


def label_points(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label beside its point, on the side where it covers the least of the others.

    Call it when the limits are final.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    points = [tuple(axes.transData.transform((label.x, label.y))) for label in labels]
    taken = [Bbox.from_bounds(x - 6 * scale, y - 6 * scale, 12 * scale, 12 * scale) for x, y in points]
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
        )


def _box(text: str, point: tuple[float, float], side: tuple[int, int], scale: float) -> Bbox:
    """What the text would cover at that side of the point; in pixels, `scale` of them a point of type."""
    width, height = len(text) * WIDTH * SIZE * scale, SIZE * HEIGHT * scale
    right, up = _offset(side)
    left = point[0] + right * scale + (side[0] - 1) * width / 2
    return Bbox.from_bounds(left, point[1] + up * scale - height / 2, width, height)


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """The area of others under the box; what lies outside the axes counts three times."""
    return sum(_area(box, other) for other in taken) + 3 * (box.width * box.height - _area(box, inside))


def _offset(side: tuple[int, int]) -> tuple[float, float]:
    """Points from the marker to where a label at this side is anchored."""
    right, up = side
    return 9.0 * right, up * (6.0 if right else 13.0)


def _area(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
