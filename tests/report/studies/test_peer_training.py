"""Losses of two models that were trained alike -> a table and a plot; and what the committed ones say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.report.draw.style import LIGHT
from lkda.report.read.files import read_results_file
from lkda.report.redraw import redraw
from lkda.report.studies.peer_training import CLOSE, KIND, differences
from tests.report.conftest import drawn

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMMITTED = sorted(RESULTS.glob("peer_training_*/results.json"))


def course(last: float) -> dict[str, Any]:
    return {"loss": [7.0] * 50 + [last] * 50, "val_loss": last + 0.1, "seconds": 1.0}


def peer(**changes: Any) -> dict[str, Any]:
    model = {"name": "tiny", "num_layers": 4, "d_model": 128}
    settings = {
        "mixer": {"name": "softmax"},
        "model": model,
        "trainer": {"precision": "32-true"},
        "data": {"source": "sotu"},
    }
    of_peer = {"peer": "llama", "version": "transformers 5.24.0", "tokens_per_step": 512, "settings": settings}
    return {**of_peer, "ours": course(4.0), "theirs": course(4.002), "ours_rounded": course(3.999), **changes}


def test_differences_are_of_the_peer_less_ours(tmp_path: Path) -> None:
    found = differences(peer(), "theirs")
    assert found == {"first step": 0, "last 50 steps": pytest.approx(0.002), "validation": pytest.approx(0.002)}
    header = {"device": "cpu, 1 thread", "torch": "2.13"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"kind": KIND, "header": header, "peers": [peer()], "failed": {}}))
    redraw(path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.json", "peer_training.png"}
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["validation"] for row in table["rows"]] == ["+2.0e-03", "-1.0e-03"]
    assert "100 steps of 512 tokens" in table["note"]


@pytest.mark.parametrize("count", [1, 2])
def test_the_legend_names_both_packages_and_fits_into_the_figure(
    count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    header = {"device": "cpu, 1 thread", "torch": "2.13"}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"kind": KIND, "header": header, "peers": [peer()] * count, "failed": {}}))
    (figure,) = drawn(monkeypatch, lambda: redraw(path))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:2] == ["model of lkda", "model of transformers"]
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    upper = figure.axes[0]
    assert "mixer=softmax" in upper.get_title()
    assert [line.get_color() for line in upper.lines] == list(LIGHT.implementations[:2])


def test_what_is_not_of_the_command_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    broken = peer()
    del broken["theirs"]
    path.write_text(json.dumps({"kind": KIND, "header": {}, "peers": [broken]}))
    with pytest.raises(ValueError, match=r"results.json is not of lkda.commands.studies.peer_training \('theirs'\)"):
        redraw(path)
    path.write_text(json.dumps({"kind": KIND, "header": {}, "peers": []}))
    with pytest.raises(ValueError, match=r"is not of lkda\.commands\.studies\.peer_training"):
        redraw(path)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_runs_are_close(path: Path) -> None:
    found = read_results_file(path, kind=KIND)
    assert found["failed"] == {}
    for each in found["peers"]:
        assert len(each["ours"]["loss"]) == len(each["theirs"]["loss"]) == 500
        assert max(map(abs, differences(each, "theirs").values())) < CLOSE
