"""What keeps the plots readable: labels that do not overlap, colours that stay, numbers as people write them."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure

from lkda.report.draw.labels import Label, label_ends, label_points, spread
from lkda.report.draw.style import DARK, KNOWN, LIGHT
from lkda.report.draw.units import count, length, memory, three


@pytest.mark.parametrize("heights", [[1.0, 1.01, 1.02, 5.0], [0.0, 0.0, 0.0], [1.0, 2.0, 2.9, 3.0, 3.1], [4.0]])
def test_heights_are_spread_in_order_and_apart(heights):
    placed = spread(heights, gap=0.5)
    assert all(b - a >= 0.5 - 1e-9 for a, b in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))
    assert min(spread(heights, gap=0.5, low=0.2)) >= 0.2


def test_what_lies_apart_stays():
    assert spread([0.0, 1.0, 2.0], gap=0.5) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("write", [label_ends, label_points])
def test_crowded_labels_do_not_overlap(write):
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    write(axes, [Label(5 + 0.01 * n, 0.5 + 0.001 * n, name, "k") for n, name in enumerate(("kda", "softmax", "mla"))])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 3
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_mixer_keeps_its_colour(theme):
    everything = theme.colours([*KNOWN, "mamba", "gla"])
    assert len(set(everything.values())) == len(KNOWN) + 2
    assert theme.colours(["softmax", "mla"])["softmax"] == everything["softmax"]
    assert theme.colours(["mamba"]) == {"mamba": everything["mamba"]}


@pytest.mark.parametrize(
    ("write", "x", "text"),
    [
        (three, 0.06123, "0.0612"),
        (three, 0.0, "0"),
        (three, 999.7, "1,000"),
        (three, 1042.3, "1,042"),
        (count, 950.0, "950"),
        (count, 999_999.0, "1M"),
        (count, 1_234_567.0, "1.23M"),
        (memory, 512.0, "512 B"),
        (memory, 131_072.0, "128 KiB"),
        (memory, 1023.0 * 1024, "1023 KiB"),
        (length, 512.0, "512"),
        (length, 65_536.0, "64K"),
        (length, 2.0**20, "1M"),
    ],
)
def test_numbers(write, x, text):
    assert write(x) == text
