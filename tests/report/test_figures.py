"""The figures of README show what their JSON holds: each PNG has the digest of a picture that is drawn from it now."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from lkda.report.draw.digest import KEYWORD, contents, digest, with_digest
from lkda.report.redraw import redraw, source

ROOT = Path(__file__).parents[2]
FIGURES = sorted(set(re.findall(r"\]\((docs/results/[^)]+\.png)\)", (ROOT / "README.md").read_text(encoding="utf-8"))))


def digest_of(path: Path) -> str | None:
    """The digest in a PNG file; None where it has none."""
    with Image.open(path) as picture:
        return picture.info.get(KEYWORD)


@pytest.mark.slow
@pytest.mark.parametrize("directory", sorted({str(Path(figure).parent) for figure in FIGURES}))
def test_the_figures_of_the_readme_are_drawn_from_their_results(directory: str, tmp_path: Path) -> None:
    path = source(ROOT / directory)
    assert path is not None
    copy = shutil.copy(path, tmp_path / path.name)
    redraw(Path(copy))
    for figure in (ROOT / name for name in FIGURES if str(Path(name).parent) == directory):
        shown = digest_of(figure)
        assert shown == digest_of(tmp_path / figure.name), (
            f"python -m lkda.report.redraw {directory} draws {figure.name}"
        )
        assert shown is not None


def test_a_digest_is_read_back(tmp_path: Path) -> None:
    Image.new("RGB", (2, 3)).save(tmp_path / "a.png")
    assert digest_of(tmp_path / "a.png") is None
    (tmp_path / "a.png").write_bytes(with_digest((tmp_path / "a.png").read_bytes(), "0123"))
    assert digest_of(tmp_path / "a.png") == "0123"


def test_the_digest_follows_the_numbers_that_are_drawn() -> None:
    def drawn(*values: float) -> str:
        figure = Figure()
        axes = figure.subplots()
        axes.plot([1, 2], values)
        axes.bar([1, 2], values)
        return digest(contents(figure))

    assert drawn(1.0, 2.0) == drawn(1.0, 2.0 + 1e-9)  # the last digits depend on the machine
    assert drawn(1.0, 2.0) != drawn(1.0, 2.01)
    assert digest({"a": [1, "b", None]}) != digest({"a": [1, "c", None]})
