"""How plots look: a light and a dark theme, and a colour that a mixer keeps from picture to picture."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# The order of the hues in both themes: Okabe and Ito's, which most colour-blind readers tell apart, darkened for text
# on white and lightened for text on black. This package's mixers own the first six, any other shares the rest.
KNOWN = ("kda", "softmax", "simplified", "mla", "kda_mla_3to1", "kda_softmax_3to1")

# What tells several curves of one mixer apart, since they share its colour.
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Theme:
    """Colours of one look: the page behind the plot, its text, secondary text, grid lines, and the palette."""

    background: str
    text: str
    faint: str
    grid: str
    palette: tuple[str, ...]

    def style(self) -> AbstractContextManager[None]:
        """Matplotlib's settings, for the length of a `with`."""
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
            "figure.dpi": 200,
        }
        return mpl.rc_context(settings)

    def colours(self, names: Sequence[str]) -> dict[str, str]:
        """A colour for each name: its own for a known mixer, one that follows from the name for any other."""
        free = list(self.palette[len(KNOWN) :])
        chosen: dict[str, str] = {}
        for name in dict.fromkeys(names):
            if name in KNOWN:
                chosen[name] = self.palette[KNOWN.index(name)]
                continue
            start = zlib.crc32(name.encode()) % len(free)
            turn = free[start:] + free[:start]
            chosen[name] = next((colour for colour in turn if colour not in chosen.values()), turn[0])
        return chosen


LIGHT = Theme(
    background="#ffffff",
    text="#222222",
    faint="#767676",
    grid="#e9e9e9",
    palette=(
        *("#0067b1", "#d1580b", "#00876a", "#b4578f", "#b07d00", "#2b97d3"),
        *("#5b5b5b", "#6a51a3", "#8b1a3a", "#4d7c0f", "#0e7c86", "#a0522d"),
    ),
)
DARK = Theme(
    background="#15171a",
    text="#e4e4e4",
    faint="#8f949b",
    grid="#2b2f35",
    palette=(
        *("#4ea4ea", "#f28b46", "#30c29a", "#e38fc3", "#e6b93f", "#93d3f7"),
        *("#b9b9b9", "#b39df0", "#f2708f", "#a3cf5b", "#55c8d3", "#d79a75"),
    ),
)


def turns(names: Sequence[str]) -> list[int]:
    """0 for the first of each name, 1 for its second ..."""
    return [list(names[:n]).count(name) for n, name in enumerate(names)]


@dataclass(frozen=True)
class Picture:
    """One plot as two PNG files' contents, for a light and for a dark page."""

    light: bytes
    dark: bytes


def picture(draw: Callable[[Theme], Figure]) -> Picture:
    """Draws in both themes. `draw` returns the finished figure of one."""
    return Picture(*(_png(draw, theme) for theme in (LIGHT, DARK)))


def _png(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    buffer = io.BytesIO()
    with theme.style():
        # No software version in the file: the same results give the same bytes.
        draw(theme).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
