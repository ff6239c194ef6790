"""A benchmark's JSON -> table and plots."""

from __future__ import annotations

import csv
import io
import itertools
import json

import matplotlib.image
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from lkda.report.draw.labels import ABOVE_GRID
from lkda.report.draw.style import LIGHT
from lkda.report.operators import benchmark as bench
from lkda.report.operators import plots as bench_plots
from lkda.report.operators import time_grid
from lkda.report.operators.plots import SOFTMAX
from lkda.report.readme import fill
from lkda.report.redraw import redraw
from tests.report.conftest import bench_row, drawn

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
    assert (lines[0]["graph ms"], lines[0]["eager ms"], lines[0]["p20-p80 ms"]) == ("0.150", "0.200", "0.147-0.153")
    assert lines[0]["x lower bound"] == "2.68"  # of the graph
    assert (lines[1]["graph ms"], lines[1]["eager ms"], lines[1]["x lower bound"]) == ("", "12.000", "214.29")
    assert [line["implementation"] for line in lines[:4]] == ["lkda cuda", "lkda chunk", "fla chunk_kda", "cudnn"]
    assert lines[3]["why not"] == "takes heads of 128 only"
    assert lines[3]["eager ms"] == lines[3]["graph ms"] == ""
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


def test_time_per_token_by_length_compares_the_same_number_of_tokens():
    curves = bench_plots.by_length([*ROWS, *LENGTHS], mode="fwd")
    assert {(name[0], name[4], len(points)) for name, points in curves.items()} == {
        ("kda", "16K tokens", 5),
        ("simplified", "16K tokens", 5),
    }
    assert next(iter(curves.values()))[0] == (1024, pytest.approx(0.2e6 / (16384 * 16)))


def drawn_times(rows, *, mode):
    (cells,) = time_grid.pages(rows, mode=mode)
    return time_grid.times(cells, mode=mode)


@pytest.mark.parametrize(("draw", "rows"), [(drawn_times, ROWS), (bench_plots.time_per_token_by_length, LENGTHS)])
def test_plots_show_something_in_both_styles(draw, rows):
    picture = draw(rows, mode="fwd")
    for png, brightness in ((picture.light, 1.0), (picture.dark, 0.1)):
        pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
        assert pixels[0, 0].mean() == pytest.approx(brightness, abs=0.05)
        assert (pixels.max(-1) - pixels.min(-1) > 0.3).mean() > 0.001


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
    grows = changes.get("peer") == SOFTMAX
    return [
        bench_row(
            op, T=2**n, B=2 ** (14 - n), ms=0.1 * 2 ** (n - 10) if grows else changes["time"], **_without(changes)
        )
        for n in range(10, 15)
    ]


def _without(changes):
    return {name: x for name, x in changes.items() if name != "time"}


def test_the_crossing_with_softmax_is_read_between_lengths():
    rows = lengths("kda", time=0.3) + lengths("kda", backend=None, peer=SOFTMAX)
    ((at, cost),) = bench_plots.crossings(bench_plots.by_length(rows, mode="fwd"))
    assert at == pytest.approx(3 * 1024)
    assert cost == pytest.approx(0.3e6 / (2**14 * 16))
    assert bench_plots.crossings(bench_plots.by_length(lengths("kda", time=0.3), mode="fwd")) == []


def test_no_times_are_no_picture_and_no_lengths_an_error():
    assert time_grid.pages(ROWS, mode="bwd") == []
    with pytest.raises(ValueError, match="the benchmark has no fwd times at several lengths"):
        bench_plots.time_per_token_by_length(ROWS, mode="fwd")


def test_a_curve_is_labelled_by_what_it_is_and_has_its_own_colour(monkeypatch):
    rows = lengths("kda", time=0.3) + lengths("kda", backend=None, peer=SOFTMAX) + lengths("simplified", time=0.1)
    rows += lengths("kda", backend="chunk", time=9.0) + lengths("simplified", backend="chunk", time=5.0)
    (curves,) = drawn(monkeypatch, lambda: bench_plots.time_per_token_by_length(rows, mode="fwd"))
    labels = {text.get_text(): text.get_color() for text in curves.axes[0].texts}
    style = LIGHT.colours(["kda", "softmax", "simplified"])
    assert labels.pop(SOFTMAX) == style["softmax"]
    assert labels.pop("kda, lkda cuda") == style["kda"]
    assert labels.pop("simplified, lkda cuda") == style["simplified"]
    others = {text: colour for text, colour in labels.items() if "slower" not in text}
    assert set(others) == {"kda, lkda chunk", "simplified, lkda chunk"}
    assert len({*others.values(), *style.values()}) == 5


def test_no_text_of_a_plot_crosses_a_curve_another_text_or_a_grid_line(monkeypatch):
    rows = lengths("kda", time=0.3) + lengths("kda", backend=None, peer=SOFTMAX) + lengths("simplified", time=0.1)
    (figure,) = drawn(monkeypatch, lambda: bench_plots.time_per_token_by_length(rows, mode="fwd"))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert any("T = 3,100" in text for text in boxes)
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    for line in (line for line in axes.lines if len(line.get_xdata()) > 1):
        path = line.get_transform().transform_path(line.get_path())
        assert [text for text, box in boxes.items() if path.intersects_bbox(box, filled=False)] == []
    assert {text.get_zorder() >= ABOVE_GRID for text in axes.texts} == {True}
    assert any(isinstance(patch, Rectangle) for patch in axes.patches)  # it hides the grid behind the labels


def marks(axes):
    """x -> whether the mark is filled; of every mark in the panel."""
    return {
        float(line.get_xdata()[0]): line.get_markerfacecolor() == line.get_color()
        for line in axes.lines
        if line.get_marker() == "o"
    }


def test_times_show_the_graph_filled_and_the_eager_call_hollow(monkeypatch):
    (figure,) = drawn(monkeypatch, lambda: drawn_times(ROWS, mode="fwd"))
    assert marks(figure.axes[0]) == {0.15: True, 0.2: False, 12.0: False, 1.1: False}
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["0.15 ms  2.68x", "1.1 ms  19.6x  eager", "12 ms  214x  eager"]


def test_a_noisy_time_is_marked_in_plot_and_table(monkeypatch):
    noisy = {"ms_p20": 0.5, "ms_p80": 4.0, "noisy": True}
    rows = [bench_row(ms=2.0, **noisy), bench_row(backend="chunk", ms=3.0, **noisy)]
    rows += [bench_row(ms=0.6, replay="graph")]
    (figure,) = drawn(monkeypatch, lambda: drawn_times(rows, mode="fwd"))
    bars = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [0.5, 4.0]]
    assert len(bars) == 2
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.6 ms  10.7x", "3 ms  53.6x  eager, noisy"]
    head, body = bench.as_cells(rows)
    assert [line[head.index("eager ms")] for line in body] == ["2.000 (noisy)", "3.000 (noisy)"]
    assert [line[head.index("graph ms")] for line in body] == ["0.600", ""]


@pytest.mark.parametrize(
    ("panels", "sizes"),
    [
        ([(op, b) for op in ("a", "b", "c") for b in range(1, 9)], [(8, 3)]),
        ([(op, b) for op in "abcd" for b in (1, 2)], [(4, 2)]),
        ([("a", b) for b in range(1, 14)], [(7, 2)]),
        ([("a", 1)], [(1, 1)]),
        ([("a", b) for b in range(1, 30)], [(8, 3), (2, 3)]),
    ],
)
def test_panels_are_laid_out_as_a_grid(panels, sizes):
    rows = [bench_row(op, "cuda", B=b, ms=0.1 * b) for op, b in panels]
    pages = time_grid.pages(rows, mode="fwd")
    assert [(len(cells), len(cells[0])) for cells in pages] == sizes
    found = [panel.title for cells in pages for line in cells for panel in line if panel]
    assert len(set(found)) == len(panels)


def test_operator_times_prefer_the_replayed_graph():
    rows = [bench_row(mode="fwd+bwd", ms=2.14), bench_row(mode="fwd+bwd", ms=0.67, replay="graph")]
    assert bench.kernel_times(rows)[1] == {"kda": 0.67}
    simplified = [bench_row("simplified", gate=None, B=8 // n, T=n, ms=0.1, replay="graph") for n in (1, 2)]
    both = [bench_row(B=8 // n, T=n, ms=ms, replay=r) for n in (1, 2) for r, ms in (("eager", 9.0), ("graph", 0.4))]
    (points,) = bench_plots.over_simplified([*simplified, *both], mode="fwd").values()
    assert [ratio for _, ratio in points] == [pytest.approx(4), pytest.approx(4)]


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
