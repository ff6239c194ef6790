"""The blocks of the pages are those that the committed JSON gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lkda.report.operators.peers import side_by_side
from lkda.report.readme import KINDS, fill
from tests.report.conftest import bench_row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text, RESULTS) == text, "python -m lkda.report.readme fills it"


def test_every_kind_of_block_is_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [kind for kind in KINDS if f"<!-- {kind}:" not in text] == []


def test_implementations_stand_side_by_side() -> None:
    rows = [
        bench_row(replay="graph", ms=0.15),
        bench_row(mode="fwd+bwd", replay="graph", ms=0.5),
        bench_row(mode="fwd+bwd", ms=9.0),  # eager: of the host too
        bench_row(backend=None, peer="fla chunk_kda", replay="graph", ms=1.1),
        bench_row(backend=None, peer="cudnn", replay="graph", ms=None, reason="takes heads of 128 only"),
    ]
    head, body = side_by_side(rows)
    assert head[2:] == ["lkda cuda", "fla chunk_kda", "cudnn"]
    assert [line[2:] for line in body] == [["0.150 / 0.500", "1.100", ""]]


def test_speeds_are_sorted_and_say_nothing_of_accuracy(tmp_path: Path) -> None:
    rows = [
        {"mixer": name, "seeds": 1, "val/loss": 4.0, "params": 1e6, "tokens_per_s": speed}
        for name, speed in (("slow", 1e3), ("quick", 2e3))
    ]
    (tmp_path / "NAME").mkdir()
    record = {
        "kind": "comparison",
        "runs": [],
        "benchmark": None,
        "rows": rows,
        "notes": ["2 runs on a device.", "Another note."],
    }
    (tmp_path / "NAME" / "results.json").write_text(json.dumps(record))
    block = fill("<!-- speeds:NAME -->\n<!-- /speeds:NAME -->", tmp_path)
    assert [line.split("|")[1].strip() for line in block.splitlines() if line.startswith("|")][2:] == ["quick", "slow"]
    assert "loss" not in block
    assert "Another" not in block
