"""An interactive chart: a Vega-Lite specification with its two palettes. Also drawn as SVG and PNG."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lkda.report.draw.digest import digest, with_digest
from lkda.report.draw.style import DARK, LIGHT, Style

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
WIDTH, HEIGHT = 620, 340  # of a chart in a file, in points
CAPTION_WIDTH = 100  # letters of a line below the title
PNG_SCALE = 2.0  # pixels per point
DRAG = "[pointerdown[event.pointerType !== 'touch'], window:pointerup] > window:pointermove!"


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: of its files.
        title: the heading above it.
        caption: what is shown: device, dtype, shape.
        spec: Vega-Lite, without size, title and colours. Colours are those of `domain`, and the expressions `ink`, of
            text, `faint_ink`, and `page`, of the background.
        domain: what colours stand for, in the order of the legend.
        mixers: for each of `domain`, the mixer whose colour it has; a further one of a mixer has a colour of its own.
    """

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    domain: tuple[str, ...]
    mixers: tuple[str, ...]

    def config(self, style: Style) -> dict[str, Any]:
        """The colours of a light or a dark page."""
        palette = [look.colour for look in style.looks(self.mixers, self.domain)]
        lines = {"labelColor": style.text, "titleColor": style.text, "domainColor": style.faint}
        font = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
        return {
            "background": style.background,
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "range": {"category": palette},
            "axis": lines | font | {"gridColor": style.grid, "tickColor": style.faint},
            "legend": {"labelColor": style.text, "titleColor": style.text, "labelFontSize": 12},
            "params": [
                {"name": "ink", "value": style.text},
                {"name": "faint_ink", "value": style.faint},
                {"name": "page", "value": style.background},
            ],
        }

    @cached_property
    def files(self) -> dict[str, str | bytes]:
        """The chart as SVG and as PNG, by the name of the file."""
        import vl_convert

        drawn = {
            **self.spec,
            "width": WIDTH,
            "height": HEIGHT,
            "title": {
                "text": self.title,
                "subtitle": self._subtitle(),
                "anchor": "start",
                "subtitleColor": LIGHT.faint,
            },
        }
        svg = _renumbered(vl_convert.vegalite_to_svg(drawn, config=self.config(LIGHT)))
        shown = digest([self.title, self.caption, dict(self.spec)])
        png = with_digest(vl_convert.svg_to_png(svg, scale=PNG_SCALE), shown)
        return {f"{self.name}.svg": svg, f"{self.name}.png": png}

    def _subtitle(self) -> list[str]:
        """The caption in lines; in a file, where there is no menu, with the setting that is shown."""
        setting = next((one["value"] for one in self.spec.get("params", ()) if one["name"] == "setting"), "")
        shown = f" Shown: {setting}." if setting and setting not in self.caption else ""
        return textwrap.wrap(self.caption + shown, CAPTION_WIDTH)

    def embedded(self) -> dict[str, Any]:
        """What the page needs: the specification, which fills the width, and the colours of both themes."""
        spec = {
            **self.spec,
            "layer": [_not_moved_by_fingers(layer) for layer in self.spec["layer"]],
            "width": "container",
            "height": HEIGHT,
            "autosize": {"type": "fit-x", "contains": "padding"},
        }
        return {"spec": spec, "light": self.config(LIGHT), "dark": self.config(DARK)}


def _not_moved_by_fingers(layer: Mapping[str, Any]) -> dict[str, Any]:
    """On a phone a chart takes the whole width, so a finger on it must scroll the page."""
    drag = {"on": DRAG, "translate": DRAG}
    params = [
        param | {"select": param["select"] | drag} if param["select"]["type"] == "interval" else param
        for param in layer.get("params", ())
    ]
    return {**layer, "params": params} if params else {**layer}


def _renumbered(svg: str) -> str:
    """The same picture with identifiers that do not depend on what was drawn before in this process."""
    found = list(dict.fromkeys(re.findall(r'id="(clip\d+|gradient_?\d+)"', svg)))
    numbers = {name: f"part{n}" for n, name in enumerate(found)}
    return re.sub(r"\b(clip\d+|gradient_?\d+)\b", lambda match: numbers.get(match[0], match[0]), svg)
