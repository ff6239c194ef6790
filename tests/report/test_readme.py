"""The blocks of the pages are those that the committed JSON gives."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from lkda.report.operators.by_shape import by_shape
from lkda.report.operators.peers import side_by_side
from lkda.report.readme import KINDS, fill
from lkda.report.training.comparison import read_comparison
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


def test_the_committed_page_says_what_its_results_say() -> None:
    """Its paragraphs on top have the figures of results.json."""
    path = ROOT / "docs" / "results" / "tradeoff_h200" / "report.html"
    assert path.stat().st_size < 6_000_000
    summary = read_comparison(path.with_name("results.json")).tradeoff.summary
    lead = html.unescape(" ".join(re.findall('<p class="lead">(.*?)</p>', path.read_text(encoding="utf-8"))))
    figures, shown = (
        set(re.findall(r"[\d.,]+(?: ± [\d.]+| tokens/s| [KMG]iB| times|[KM]\b)", x)) for x in (summary, lead)
    )
    assert len(figures) > 10
    assert figures <= shown, f"python -m lkda.report.redraw {path.parent}"


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


def test_a_line_for_each_shape_has_eager_times_and_other_libraries_at_fast_gates() -> None:
    peer = {"backend": None, "peer": "cudnn kimi_delta_attention", "replay": "graph"}
    rows = [
        bench_row(replay="graph", ms=0.15),
        bench_row(ms=0.2),
        bench_row(gate="fast", mode="fwd+bwd", replay="graph", ms=0.5, peak_mib=325.6),
        bench_row(gate="slow", **peer, ms=2.0),
        bench_row(gate="fast", **peer, ms=0.1),
    ]
    head, body = by_shape(rows)
    lines = [{name: cell for name, cell in zip(head, line, strict=True) if cell} for line in body]
    assert lines == [
        {"B T H D": "8 2048 16 64", "gates": "slow", "forward": "0.150", "eager: forward": "0.200"},
        {
            **{"B T H D": "8 2048 16 64", "gates": "fast", "forward + backward": "0.500"},
            **{"cuDNN: forward": "0.100", "peak MiB": "326"},
        },
    ]
    with pytest.raises(ValueError, match="of one backend of lkda, and the benchmark has 2"):
        by_shape([*rows, bench_row(backend="chunk")])
