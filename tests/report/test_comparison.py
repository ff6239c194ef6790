"""Run directories -> table, plots, page."""

from __future__ import annotations

import csv
import io
import json
import statistics

import matplotlib.image
import pytest

from lkda.report import table
from lkda.report.comparison import compare
from lkda.report.readme import fill
from lkda.report.runs import group_runs, read_runs
from tests.report.conftest import write_run


def test_seeds_are_one_row_with_mean_and_spread(runs):
    found, skipped = read_runs(runs)
    rows = {row["mixer"]: row for row in table.rows(group_runs(found))}
    assert skipped == []
    assert list(rows) == ["kda_mla_3to1", "kda", "softmax", "simplified"]
    losses = [run.summary["val/loss"] for run in found if run.summary["mixer"] == "kda"]
    assert rows["kda"]["seeds"] == 3
    assert rows["kda"]["val/loss"] == pytest.approx(statistics.fmean(losses))
    assert rows["kda"]["val/loss sd"] == pytest.approx(statistics.stdev(losses))
    assert "val/loss sd" not in rows["softmax"]


def test_what_is_no_finished_run_is_left_out_by_name(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_run(tmp_path / "stopped", "kda", status="interrupted")
    torn = write_run(tmp_path / "torn", "kda")
    (torn / "summary.json").write_text('{"mixer": "k')
    running = write_run(tmp_path / "running", "kda")
    (running / "summary.json").unlink()
    poor = write_run(tmp_path / "poor", "kda", state_bytes=None)
    others = [tmp_path / "empty", tmp_path / "file", tmp_path / "stopped", torn, running, poor]
    found, skipped = read_runs([*runs, *others])
    assert len(found) == len(runs)
    assert {path.name: reason.split(" (")[0] for path, reason in skipped} == {
        "empty": "no summary.json: not a run",
        "file": "not a directory",
        "stopped": "the run is interrupted, not finished",
        "torn": "summary.json is not JSON",
        "running": "no summary.json: still running, or killed",
        "poor": "summary.json lacks state_bytes",
    }
    with pytest.raises(ValueError, match=r"none of the 6 directories is a finished run \(empty: no summary"):
        compare(others, tmp_path / "out", title="t")


def test_what_differs_besides_the_mixer_is_in_the_label(tmp_path):
    paths = [
        write_run(tmp_path / "a", "kda", learning_rate=0.01),
        write_run(tmp_path / "b", "kda", learning_rate=0.02),
        write_run(tmp_path / "c", "softmax", learning_rate=0.02, backend="sdpa"),
    ]
    labels = {group.label for group in group_runs(read_runs(paths)[0])}
    assert labels == {"kda · lr 0.01", "kda · lr 0.02", "softmax · lr 0.02"}


def test_compare_writes_table_plots_and_page(tmp_path, runs):
    out = tmp_path / "out"
    result = compare(runs, out, title="All mixers", kernel_ms={"kda": 1.5})
    assert sorted(path.name for path in out.iterdir()) == [
        "loss_by_seconds.png",
        "loss_by_state.png",
        "loss_by_tokens.png",
        "report.html",
        "results.json",
        "table.csv",
        "table.md",
    ]
    for name in ("loss_by_tokens", "loss_by_seconds", "loss_by_state"):
        pixels = matplotlib.image.imread(out / f"{name}.png")
        assert pixels[..., :3].std() > 0.02
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert float(rows[1]["kernel_ms"]) == 1.5
    assert float(rows[0]["state_bytes"]) == 420_000
    assert json.loads((out / "results.json").read_text())["rows"] == result.rows
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "All mixers" in page
    assert "± " in (out / "table.md").read_text()


def test_other_data_are_compared_in_bits_per_byte(tmp_path):
    paths = [write_run(tmp_path / "a", "kda"), write_run(tmp_path / "b", "kda", data="files", unigram_entropy=5.0)]
    result = compare(paths, tmp_path / "out", title="t")
    assert any("compare bits per byte" in note for note in result.notes)
    assert {row["mixer"] for row in result.rows} == {"kda · sotu", "kda · files"}


def test_readme_blocks_are_filled_from_results(tmp_path, runs):
    compare(runs, tmp_path / "results" / "demo", title="t")
    text = "before\n<!-- results:demo -->\nold\n<!-- /results:demo -->\nafter\n"
    filled = fill(text, tmp_path / "results")
    assert "old" not in filled
    assert "| kda_mla_3to1 |" in filled
    assert filled.startswith("before\n")
    assert fill(filled, tmp_path / "results") == filled
    with pytest.raises(ValueError, match="the block results:none needs"):
        fill(text.replace("demo", "none"), tmp_path / "results")
