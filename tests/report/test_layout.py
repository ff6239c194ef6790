"""The picture of the packages is that of the imports."""

from __future__ import annotations

from graphlib import CycleError
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lkda.report.layout import BATCH_PATH, arrows, dependencies, levels, svg

ROOT = Path(__file__).parents[2]


def packages(home: Path, **imports: str) -> Path:
    """Packages with one module each, and the files of the path of a batch."""
    for _, file in BATCH_PATH:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    for package, text in imports.items():
        (home / package).mkdir(parents=True, exist_ok=True)
        (home / package / "__init__.py").touch()
        (home / package / "module.py").write_text(text)
    return home


def test_the_picture_is_current() -> None:
    assert (ROOT / "docs" / "layout.svg").read_text(encoding="utf-8") == svg(), "python -m lkda.report.layout draws it"


@pytest.mark.slow
def test_no_box_is_cut_off_or_covers_another() -> None:
    picture = ElementTree.fromstring((ROOT / "docs" / "layout.svg").read_text(encoding="utf-8"))
    _, _, right, bottom = map(float, picture.attrib["viewBox"].split())
    _, *boxes = picture.iter("{http://www.w3.org/2000/svg}rect")
    sides = [tuple(float(box.attrib[name]) for name in ("x", "y", "width", "height")) for box in boxes]
    assert len(sides) == len(BATCH_PATH) + len(dependencies())
    for x, y, width, height in sides:
        assert x >= 0
        assert y >= 0
        assert x + width <= right
        assert y + height <= bottom
    for (x, y, width, height), (x2, y2, width2, height2) in combinations(sides, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    for text in picture.iter("{http://www.w3.org/2000/svg}text"):
        left, base, letters = float(text.attrib["x"]), float(text.attrib["y"]), len(text.text or "")
        around = [side for side in sides if side[0] <= left <= side[0] + side[2] and side[1] <= base <= sum(side[1::2])]
        size = float(text.attrib["font-size"])
        if base > 34 and size != 12:  # the two headings, and the note at the foot
            assert any(
                left + (0.6 if "font-weight" in text.attrib else 0.52) * size * letters <= x + width
                for x, _, width, _ in around
            ), text.text


def test_packages_and_arrows_follow_the_imports(tmp_path: Path) -> None:
    home = packages(
        tmp_path,
        commands="def run():\n    from lkda.training import task\n    import lkda.ops.kda.op\n",
        training="from lkda.ops import kda_attention\n",
        ops="import torch\n",
        data="from lkda.checks import InputError\n",
    )
    graph = dependencies(home)
    assert graph == {
        "scripts": {"commands"},
        "commands": {"training", "ops"},
        "training": {"ops"},
        "ops": set(),
        "data": set(),
    }
    assert levels(graph) == [["data", "scripts"], ["commands"], ["training"], ["ops"]]
    assert arrows(graph) == [("commands", "training"), ("scripts", "commands"), ("training", "ops")]
    before = svg(home)
    (home / "training" / "module.py").write_text("from lkda.data import packing\n")
    assert svg(home) != before


def test_what_cannot_be_drawn_is_an_error(tmp_path: Path) -> None:
    home = packages(tmp_path, commands="import lkda.data.packing\n", data="import lkda.commands.train\n")
    with pytest.raises(CycleError):
        svg(home)
    (home / BATCH_PATH[0][1]).unlink()
    with pytest.raises(ValueError, match=f"lkda/{BATCH_PATH[0][1]} is on the path of a batch and is not there"):
        svg(home)
