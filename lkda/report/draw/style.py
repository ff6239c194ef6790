"""How plots look: a light and a dark style, and a colour for each mixer that is the same in every picture."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lkda.report.draw.digest import contents, digest, with_digest

# The hues are those of Okabe and Ito, which most colour-blind readers can distinguish, darkened for text on white and
# lightened for text on black. These mixers have the first six colours; other names share the rest.
KNOWN = ("kda", "softmax", "simplified", "mla", "kda_mla_3to1", "kda_softmax_3to1")

# The settings of configs/mixer, as labels write them. Of several curves of a mixer, the one with most of them has the
# mixer's colour.
DEFAULTS = {
    "kda": {
        *("gate channel", "gate_form softplus", "conv_width 4", "activation silu", "output_gate True"),
        "negative_eigenvalues False",
    },
    "simplified": {"decay token", "conv_width 4", "activation silu", "output_norm True", "output_gate True"},
}

# The first, second, ... curve of one mixer.
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")

DOTS_PER_INCH = 200
# A larger figure has fewer dots per inch, so that it fits on a screen.
MOST_PIXELS = (1600, 1000)


@dataclass(frozen=True)
class Look:
    """The colour, line style and marker of one curve."""

    colour: str
    line: str
    marker: str


@dataclass(frozen=True)
class Style:
    """The colours of a plot: its background, text, secondary text, grid lines, and the palette for curves."""

    background: str
    text: str
    faint: str
    grid: str
    palette: tuple[str, ...]

    def applied(self) -> AbstractContextManager[None]:
        """A context in which Matplotlib draws in this style."""
        settings: dict[Any, Any] = {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": self.faint,
            "axes.linewidth": 0.8,
            "axes.labelcolor": self.text,
            "axes.facecolor": self.background,
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "text.color": self.text,
            "xtick.color": self.faint,
            "ytick.color": self.faint,
            "xtick.labelcolor": self.text,
            "ytick.labelcolor": self.text,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": self.grid,
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "figure.dpi": DOTS_PER_INCH,
        }
        return mpl.rc_context(settings)

    @property
    def implementations(self) -> tuple[str, str, str]:
        """Colours for implementations of one mixer: lkda's, and two others. No mixer has them, and where two curves
        coincide, both can be seen."""
        return self.palette[7], self.palette[9], self.palette[11]

    def colours(self, names: Sequence[str]) -> dict[str, str]:
        """A colour for each name. A known mixer has its own; for any other name it is chosen by a hash of the name.

        No two of up to twelve names have the same colour.
        """
        free = list(self.palette[len(KNOWN) :])
        lent = [colour for colour, mixer in zip(self.palette, KNOWN) if mixer not in names]
        chosen: dict[str, str] = {}
        for name in dict.fromkeys(names):
            if name in KNOWN:
                chosen[name] = self.palette[KNOWN.index(name)]
                continue
            start = zlib.crc32(name.encode()) % len(free)
            candidates = free[start:] + free[:start] + lent
            unused = (colour for colour in candidates if colour not in chosen.values())
            chosen[name] = next(unused, candidates[0])
        return chosen

    def looks(self, mixers: Sequence[str], labels: Sequence[str]) -> list[Look]:
        """A look for each curve of these mixers and labels.

        One curve of each mixer has the mixer's colour and a solid line: the first of those with most of DEFAULTS in
        their labels. Its further curves have a colour of their own, by their label, and another line style and marker.
        """
        occurrences = variant_index(mixers, labels)
        names = [label if n else mixer for mixer, label, n in zip(mixers, labels, occurrences, strict=True)]
        chosen = self.colours(names)
        return [Look(chosen[x], LINES[n % len(LINES)], MARKERS[n % len(MARKERS)]) for x, n in zip(names, occurrences)]


LIGHT = Style(
    background="#ffffff",
    text="#222222",
    faint="#767676",
    grid="#e9e9e9",
    palette=(
        *("#0067b1", "#d1580b", "#00876a", "#b4578f", "#b07d00", "#2b97d3"),
        *("#5b5b5b", "#6a51a3", "#8b1a3a", "#4d7c0f", "#0e7c86", "#a0522d"),
    ),
)
DARK = Style(
    background="#15171a",
    text="#e4e4e4",
    faint="#8f949b",
    grid="#2b2f35",
    palette=(
        *("#4ea4ea", "#f28b46", "#30c29a", "#e38fc3", "#e6b93f", "#93d3f7"),
        *("#b9b9b9", "#b39df0", "#f2708f", "#a3cf5b", "#55c8d3", "#d79a75"),
    ),
)


def variant_index(mixers: Sequence[str], labels: Sequence[str]) -> list[int]:
    """For each curve, its number among those of its mixer: 0 for the one whose label is the mixer alone, or which has
    most of DEFAULTS in its label."""
    shared = [
        math.inf if label == mixer else len(DEFAULTS.get(mixer, set()) & {*label.split(" · ")})
        for mixer, label in zip(mixers, labels)
    ]
    order = sorted(range(len(mixers)), key=lambda n: -shared[n])
    found = dict(zip(order, occurrence_index([mixers[n] for n in order]), strict=True))
    return [found[n] for n in range(len(mixers))]


def occurrence_index(names: Sequence[str]) -> list[int]:
    """For each name, how often it has occurred before: 0 for its first occurrence, 1 for its second."""
    return [list(names[:n]).count(name) for n, name in enumerate(names)]


@dataclass(frozen=True)
class Picture:
    """One plot, as the contents of a PNG file for a light page and, drawn when it is read, of one for a dark page."""

    light: bytes
    draw: Callable[[Style], Figure]

    @cached_property
    def dark(self) -> bytes:
        return _png(self.draw, DARK)


def picture(draw: Callable[[Style], Figure]) -> Picture:
    """Draws a plot. `draw` returns the finished figure in a style."""
    return Picture(_png(draw, LIGHT), draw)


def _png(draw: Callable[[Style], Figure], style: Style) -> bytes:
    buffer = io.BytesIO()
    with style.applied():
        figure = draw(style)
        width, height = figure.get_size_inches()
        dpi = min(DOTS_PER_INCH, MOST_PIXELS[0] / width, MOST_PIXELS[1] / height)
        # No software version in the file: the same results give the same bytes.
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return with_digest(buffer.getvalue(), digest(contents(figure)))
