"""A benchmark's JSON -> table and plots."""

from __future__ import annotations

import csv
import io
import json

import matplotlib.image
import pytest

from lkda.report.operators import benchmark as bench
from lkda.report.operators import plots as bench_plots
from lkda.report.readme import fill
from lkda.report.redraw import redraw
from tests.report.conftest import bench_row

ROWS = [
    bench_row(),
    bench_row(replay="graph", ms=0.15),
    bench_row(backend="chunk", ms=12.0),
    bench_row(backend=None, peer="fla chunk_kda", ms=1.1),
    bench_row(backend=None, peer="cudnn", ms=None, reason="takes heads of 128 only"),
    bench_row(mode="fwd+bwd", ms=0.6),
]
LENGTHS = [bench_row(op, T=2**n, B=2 ** (14 - n), ms=0.2) for n in range(10, 15) for op in ("kda", "simplified")]


def test_the_table_joins_replay_to_eager_and_keeps_what_was_not_measured():
    head, body = bench.as_cells(ROWS)
    lines = [dict(zip(head, line)) for line in body]
    assert len(lines) == 5
    assert (lines[0]["ms"], lines[0]["graph ms"], lines[0]["x floor"]) == ("0.200", "0.150", "3.57")
    assert [line["implementation"] for line in lines[:4]] == ["lkda cuda", "lkda chunk", "fla chunk_kda", "cudnn"]
    assert lines[3]["why not"] == "takes heads of 128 only"
    assert lines[3]["ms"] == ""
    assert bench.as_markdown(ROWS).count("\n") == 7


def test_csv_has_every_row_and_an_error_for_each_tensor():
    lines = list(csv.DictReader(io.StringIO(bench.as_csv(ROWS))))
    assert len(lines) == 6
    assert float(lines[0]["errors.o"]) == 4e-3


def test_an_operators_time_is_its_fastest_backends_where_most_operators_were_timed():
    rows = [
        bench_row("kda", mode="fwd+bwd", ms=0.6),
        bench_row("kda", "chunk", mode="fwd+bwd", ms=9.0),
        bench_row("kda", None, peer="fla", mode="fwd+bwd", ms=0.1),
        bench_row("kda", mode="fwd+bwd", ms=7.0, T=65536),
        bench_row("simplified", mode="fwd+bwd", ms=0.2),
    ]
    assert bench.kernel_times(rows) == ("fwd+bwd at 8x2048x16x64, bf16", {"kda": 0.6, "simplified": 0.2})
    assert bench.kernel_times([bench_row()]) == ("", {})


def test_cost_by_length_compares_the_same_number_of_tokens():
    curves = bench_plots.by_length([*ROWS, *LENGTHS], mode="fwd")
    assert {(name[0], name[4], len(points)) for name, points in curves.items()} == {
        ("kda", "16K tokens", 5),
        ("simplified", "16K tokens", 5),
    }
    assert next(iter(curves.values()))[0] == (1024, pytest.approx(0.2e6 / (16384 * 16)))


@pytest.mark.parametrize(("draw", "rows"), [(bench_plots.times, ROWS), (bench_plots.cost_by_length, LENGTHS)])
def test_plots_show_something_in_both_themes(draw, rows):
    picture = draw(rows, mode="fwd")
    for png, brightness in ((picture.light, 1.0), (picture.dark, 0.1)):
        pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        assert pixels[0, 0].mean() == pytest.approx(brightness, abs=0.05)
        assert (pixels.max(-1) - pixels.min(-1) > 0.3).mean() > 0.001
    with pytest.raises(ValueError, match="the benchmark has no"):
        draw(rows, mode="bwd")


def test_a_benchmark_is_written_as_table_plots_and_page(tmp_path):
    header = {"device": "an H100", "copy_gb_per_s": 3020.4}
    (tmp_path / "benchmark.json").write_text(json.dumps({"kind": "benchmark", "header": header, "rows": ROWS}))
    redraw(tmp_path / "benchmark.json")
    names = {path.name for path in tmp_path.iterdir()} - {"benchmark.json"}
    assert names == {"benchmark.csv", "report.html", "table.md", "time_fwd.png", "time_fwd_bwd.png"}
    assert "an H100, copies at 3,020 GB/s." in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind": "benchmark", "rows": []}', r"x.json is not a benchmark's JSON \('header'"),
        ('{"kind": "benchmark", "header": {}, "rows": []}', "it has no rows"),
        ('{"kind": "benchmark", "header": {}, "rows": [{"op": "kda"}]}', "a row lacks B"),
        ('{"kind": "table", "header": {}, "rows": []}', "x.json is of the kind table, and benchmark is needed"),
        ('{"header": {}, "rows": []}', "x.json does not say what it is"),
        ("[1]", "x.json does not say what it is"),
        ("step,loss", "x.json cannot be read as JSON"),
    ],
)
def test_a_file_of_another_kind_is_named_with_the_reason(tmp_path, text, reason):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        bench.read_benchmark(path)


def lengths(op, **changes):
    """Softmax from 0.1 ms doubling with T, the rest flat, at 2^14 tokens."""
    grows = changes.get("peer") == "sdpa"
    return [
        bench_row(
            op, T=2**n, B=2 ** (14 - n), ms=0.1 * 2 ** (n - 10) if grows else changes["time"], **_without(changes)
        )
        for n in range(10, 15)
    ]


def _without(changes):
    return {name: x for name, x in changes.items() if name != "time"}


def test_the_crossing_with_softmax_is_read_between_lengths():
    rows = lengths("kda", time=0.3) + lengths("kda", backend=None, peer="sdpa")
    ((at, cost),) = bench_plots.crossings(bench_plots.by_length(rows, mode="fwd"))
    assert at == pytest.approx(3 * 1024)
    assert cost == pytest.approx(0.3e6 / (2**14 * 16))
    assert bench_plots.crossings(bench_plots.by_length(lengths("kda", time=0.3), mode="fwd")) == []


def test_kda_over_simplified_is_told_by_length(tmp_path):
    rows = lengths("kda", time=0.6) + lengths("simplified", time=0.2, gate=None)
    (points,) = bench_plots.over_simplified(rows, mode="fwd").values()
    assert points == [(2**n, pytest.approx(3)) for n in range(10, 15)]
    assert bench_plots.over_simplified(lengths("kda", time=0.6), mode="fwd") == {}
    picture = tmp_path / "ratio.png"
    picture.write_bytes(bench_plots.ratio_by_length(rows, mode="fwd").light)
    assert matplotlib.image.imread(picture).std() > 0
    with pytest.raises(ValueError, match="both kda and simplified"):
        bench_plots.ratio_by_length(ROWS, mode="fwd")


def test_a_page_shows_the_benchmark(tmp_path):
    header = {"device": "a card", "copy_gb_per_s": 2964.0, "torch": "2.11"}
    (tmp_path / "fast").mkdir()
    found = {"kind": "benchmark", "header": header, "rows": ROWS}
    (tmp_path / "fast" / "benchmark.json").write_text(json.dumps(found))
    text = "before\n<!-- benchmark:fast -->\nold\n<!-- /benchmark:fast -->\nafter\n"
    filled = fill(text, tmp_path)
    assert bench.as_markdown(ROWS) in filled
    assert "a card, copies at 2,964 GB/s, torch 2.11." in filled
    assert "old" not in filled
    assert fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match=r"the block benchmark:none needs .*write it with scripts/benchmark.py"):
        fill(text.replace(":fast", ":none"), tmp_path)
