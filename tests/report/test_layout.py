"""The picture of the packages is that of the imports."""

from __future__ import annotations

from graphlib import CycleError
from pathlib import Path

import pytest

from lkda.report.layout import WAY, arrows, dependencies, levels, svg

ROOT = Path(__file__).parents[2]


def a_house(home: Path, **imports: str) -> Path:
    """Packages with one module each, and the files of the way of a batch."""
    for _, file in WAY:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    for package, text in imports.items():
        (home / package).mkdir(parents=True, exist_ok=True)
        (home / package / "__init__.py").touch()
        (home / package / "module.py").write_text(text)
    return home


def test_the_picture_is_current() -> None:
    assert (ROOT / "docs" / "layout.svg").read_text(encoding="utf-8") == svg(), "python -m lkda.report.layout draws it"


def test_packages_and_arrows_follow_the_imports(tmp_path: Path) -> None:
    home = a_house(
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
    home = a_house(tmp_path, commands="import lkda.data.packing\n", data="import lkda.commands.train\n")
    with pytest.raises(CycleError):
        svg(home)
    (home / WAY[0][1]).unlink()
    with pytest.raises(ValueError, match=f"lkda/{WAY[0][1]} is on the way of a batch and is not there"):
        svg(home)
