"""What keeps the plots readable: labels that do not overlap, colours that stay, numbers as people write them."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lkda.report.draw.labels import ABOVE_GRID, Label, label_ends, label_points, spread
from lkda.report.draw.style import DARK, DEFAULTS, KNOWN, LIGHT, LINES, picture
from lkda.report.draw.units import count, length, memory, three


@pytest.fixture(scope="module", autouse=True)
def few_pixels() -> None:
    """All of them: how large pictures are is tested here."""


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


@pytest.mark.parametrize("size", [(15.6, 24), (20, 3), (7.2, 4.3)])
def test_a_figure_fits_a_screen(size):
    """The decoding step's 24 panels in one column, a wide figure, and an ordinary one."""
    height, width, _ = matplotlib.image.imread(io.BytesIO(picture(lambda _: Figure(figsize=size)).light)).shape
    assert width <= 1600
    assert height <= 1000
    assert width == 1600 or height == 1000 or (width, height) == (1440, 860)


def test_several_curves_of_a_mixer_have_colours_of_their_own():
    one, two, three, other = LIGHT.looks(["kda", "kda", "kda", "softmax"], ["a", "b", "c", "d"])
    assert one.colour == LIGHT.colours(["kda"])["kda"]
    assert other.colour == LIGHT.colours(["softmax"])["softmax"]
    assert len({look.colour for look in (one, two, three, other)}) == 4
    assert len({(look.line, look.marker) for look in (one, two, three)}) == 3


def test_the_variant_of_the_configuration_has_the_mixers_colour():
    """Wherever it comes among the curves of the mixer, which are sorted by their accuracy."""
    labels = ["kda · gate none", "kda · gate head", "kda · gate channel", "softmax"]
    none, head, channel, softmax = LIGHT.looks(["kda"] * 3 + ["softmax"], labels)
    own = LIGHT.colours(["kda", "softmax"])
    assert (channel.colour, channel.line) == (own["kda"], LINES[0])
    assert softmax.colour == own["softmax"]
    assert len({look.colour for look in (none, head, channel, softmax)}) == 4
    assert {look.line for look in (none, head)} == {LINES[1], LINES[2]}


def test_a_label_that_is_the_mixer_alone_has_the_mixers_colour():
    """Labels of many variants name only what differs from the commonest."""
    other, plain = LIGHT.looks(["kda"] * 2, ["kda · num_heads 4", "kda"])
    assert plain.colour == LIGHT.colours(["kda"])["kda"] != other.colour


def test_the_defaults_are_those_of_the_configurations():
    for mixer, defaults in DEFAULTS.items():
        path = Path(__file__).parents[3] / "configs" / "mixer" / f"{mixer}.yaml"
        options = yaml.safe_load(path.read_text())[mixer]
        assert defaults <= {f"{name} {value}" for name, value in options.items()}


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_implementations_of_a_mixer_have_no_colour_of_a_mixer(style):
    assert not {*style.implementations} & {*style.palette[: len(KNOWN)]}


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_twelve_names_have_twelve_colours(style):
    names = ["kda", *(f"kda, variant {n}" for n in range(10)), "softmax"]
    assert len(set(style.colours(names).values())) == 12


def test_labels_of_points_that_coincide_do_not_overlap():
    figure = Figure(figsize=(7.2, 4.3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    long = "kda, conv_width 0, gate channel, output_gate "
    label_points(axes, [Label(1, 0.1, f"{long}{word}", "k") for word in ("True", "False")])
    one, other = (Text.get_window_extent(text) for text in axes.texts)
    assert not one.overlaps(other)


def test_a_label_does_not_cover_a_neighbours_error_bar_or_a_grid_line():
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    label_points(
        axes, [Label(4, 0.5, "kda_mla_3to1", "k", low=0.5, high=0.5), Label(5, 0.4, "x", "k", low=0.1, high=0.9)]
    )
    bar = axes.transData.transform([(5, 0.1), (5, 0.9)])
    for text in axes.texts:
        assert not Text.get_window_extent(text).overlaps(Bbox(bar).expanded(1, 1))
        assert text.get_bbox_patch() is not None
        assert text.get_zorder() == ABOVE_GRID


@pytest.mark.parametrize("style", [LIGHT, DARK])
def test_a_mixer_keeps_its_colour(style):
    everything = style.colours([*KNOWN, "mamba", "gla"])
    assert len(set(everything.values())) == len(KNOWN) + 2
    assert style.colours(["softmax", "mla"])["softmax"] == everything["softmax"]
    assert style.colours(["mamba"]) == {"mamba": everything["mamba"]}


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
