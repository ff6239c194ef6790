"""The plot of speed and contexts by number of GPUs: its labels, its legend and its colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from lkda.report.draw.labels import ABOVE_GRID
from lkda.report.draw.style import KNOWN, LIGHT
from lkda.report.redraw import redraw
from tests.report.conftest import drawn

VERSIONS = {"torch": "2.11.0", "lightning": "2.6"}


def row(part: str, how: str, gpus: int, *, tokens: int | None = None, speed: float = 1e5) -> dict[str, Any]:
    return {
        **{"part": part, "how": how, "gpus": gpus, "tokens": tokens, "tokens_per_s": speed * gpus, "model": "small"},
        **{"params": 4e7, "context": (tokens or 2048) * gpus, "checkpointing": "none", "precision": "bf16-mixed"},
        **{"checkpoints": 0, "device": "NVIDIA H200", "versions": VERSIONS},
    }


ROWS = [
    *(row("base", "single", 1), row("base", "ddp", 2, speed=9e4), row("base", "fsdp", 2, speed=8e4)),
    *(row("context", "single", 1, tokens=2**16), row("context", "context_parallel", 2, tokens=2**16, speed=7e4)),
    row("longest", "context_parallel", 4, tokens=2**19),
]


def test_no_grid_line_runs_through_a_label_and_the_legend_lies_below_the_panels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"kind": "scaling", "date": "2026-01-02T03", "rows": ROWS}))
    (figure,) = drawn(monkeypatch, lambda: redraw(path))
    figure.draw_without_rendering()
    shares, longest = figure.axes
    assert [text.get_text() for text in longest.texts] == ["64K", "128K", "2M"]
    (curve,) = longest.lines
    path_of_curve = curve.get_transform().transform_path(curve.get_path())
    for text in longest.texts:
        assert text.get_bbox_patch() is not None
        assert text.get_zorder() == ABOVE_GRID
        assert not path_of_curve.intersects_bbox(Text.get_window_extent(text), filled=False)
    assert shares.get_legend() is None
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {
        *("small, DDP", "small, FSDP"),
        "small, context parallel, 64K tokens per device",
    }
    assert legend.get_window_extent().y1 < shares.get_window_extent().y0
    of_mixers = LIGHT.palette[: len(KNOWN)]  # these curves are no mixers
    assert not {line.get_color() for line in shares.lines if len(line.get_xdata()) == 2} & set(of_mixers)  # type: ignore[arg-type]
