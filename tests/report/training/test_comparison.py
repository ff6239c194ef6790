"""Runs -> table, plots, page; and the command."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
from omegaconf import OmegaConf

from lkda.commands.compare import compare as compare_command
from lkda.report.draw.chart import SCHEMA
from lkda.report.draw.curves import mean_curve
from lkda.report.draw.style import LIGHT
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import read_run, read_runs
from lkda.report.readme import fill
from lkda.report.redraw import redraw
from lkda.report.training.comparison import Comparison, compare
from lkda.report.training.plots import loss_by_model, loss_curves
from lkda.report.training.table import as_cells, equal_wall_clock, rows
from tests.report.conftest import bench_row, write_run

SCRIPT = Path(__file__).parents[3] / "scripts" / "compare.py"


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """The result of a comparison with a benchmark beside a damaged one and a run that stopped, and its directory."""
    home = tmp_path_factory.mktemp("compared")
    rows = [bench_row(mode=mode, ms=1.5) for mode in ("fwd", "fwd+bwd")]
    found = {"kind": "benchmark", "header": {"device": "an H100"}, "rows": rows}
    (home / "bench").mkdir()
    (home / "bench" / "b.json").write_text(json.dumps(found))
    (home / "bench" / "damaged.json").write_text(json.dumps(found)[:-10])
    (home / "bench" / "log.json").write_text("{}")  # of another program
    stopped = write_run(home / "stopped <1>", "kda", status="interrupted")
    result = compare([*runs, stopped], home / "out", title="All & every mixer", benchmarks=[home / "bench"])
    return result, home / "out"


def read(directories, **options):
    """The comparison without its files, which take seconds to draw."""
    found, skipped = read_runs(directories)
    return Comparison("t", found, skipped, [], **options)


def coloured(path):
    """Where the picture is neither black nor white nor grey."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return pixels.max(-1) - pixels.min(-1) > 0.3


def test_a_damaged_benchmark_is_named(compared):
    result, out = compared
    (reason,) = (reason for path, reason in result.skipped if path == str(out.parent / "bench" / "damaged.json"))
    assert reason.startswith("cannot be read as JSON")
    assert len(result.skipped) == 2  # with the run that stopped
    assert f"{out.parent / 'bench' / 'damaged.json'}: {reason}" in html.unescape((out / "report.html").read_text())


def test_table_plots_and_page_are_written(compared):
    _, out = compared
    charts = ("curves_by_seconds", "curves_by_tokens", "front_by_speed", "front_by_state")
    assert sorted(path.name for path in out.iterdir()) == [
        "crossings.csv",
        *(f"{name}.{kind}" for name in charts for kind in ("png", "svg")),
        "loss_by_seconds.png",
        "loss_by_state.png",
        "loss_by_tokens.png",
        "measurements.csv",
        "report.html",
        "report.md",
        "results.json",
        "table.csv",
        "table.md",
    ]
    for name in ("loss_by_tokens", "loss_by_seconds", "loss_by_state"):
        assert 0.002 < coloured(out / f"{name}.png").mean() < 0.2


def test_the_tables_hold_the_numbers(compared):
    result, out = compared
    written = {row["mixer"]: row for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    assert float(written["kda"]["kernel_ms"]) == 1.5
    assert written["softmax"]["kernel_ms"] == ""
    assert float(written["kda_mla_3to1"]["state_bytes"]) == 210_944
    assert json.loads((out / "results.json").read_text())["rows"] == result.rows
    line = next(line for line in (out / "table.md").read_text().splitlines() if line.startswith("| kda |"))
    loss = next(row for row in result.rows if row["mixer"] == "kda")
    assert line.startswith(f"| kda | 3 | {loss['val/loss']:.3f} ± {loss['val/loss sd']:.3f} |")
    assert "| 7.1k ± 100 |" in line
    assert line.endswith("| 1.500 |")


def test_the_page_stands_alone_in_light_and_dark(compared):
    page = (compared[1] / "report.html").read_text()
    assert len(page) < 6_000_000
    own = re.sub(r"<script type=.module.>.*?</script>|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert set(re.findall(r"https?://[\w./-]*", own)) == {SCHEMA}  # a name, which nothing fetches
    assert not re.search(r"<(script|img|link|iframe)[^>]* (src|href)=", own)
    assert "prefers-color-scheme: dark" in page
    assert "<h1>All &amp; every mixer</h1>" in page
    assert "stopped &lt;1&gt;: the run is interrupted, not finished" in page


def test_everything_is_drawn_again_from_the_json_alone(compared, tmp_path):
    shutil.copy(compared[1] / "results.json", tmp_path)
    redraw(tmp_path / "results.json")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in compared[1].iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (compared[1] / path.name).read_bytes()


def test_runs_of_other_data_are_not_compared_with_each_other(tmp_path):
    paths = [
        write_run(tmp_path / "a", "kda"),
        write_run(tmp_path / "b", "kda", data="files", unigram_entropy=5.0, settings={"data": {"source": "files"}}),
    ]
    result = compare(paths, tmp_path / "out", title="t")
    assert "The data differ: sotu; files. Only rows of the same data can be compared." in result.notes
    shown = {line[0]: line[1] for line in result.tables()["runs"].body}
    assert shown == {"kda · sotu": "this is the best", "kda · files": "this is the best"}
    first, second = result.tradeoff.summary.split("\n\n")
    assert first.startswith("With 1.02M training tokens, on sotu, kda · sotu is the only model: its validation bits")
    assert second.startswith("With 1.02M training tokens, on files, kda · files is the only model")
    fronts = result.tradeoff.charts()[1].spec
    assert {record["setting"] for record in fronts["data"]["values"]} == {"sotu", "files"}
    assert all(record["front"] for record in fronts["data"]["values"])
    assert {row["mixer"] for row in result.rows} == {"kda · sotu", "kda · files"}
    assert not any("val/loss" in row or "val/perplexity" in row for row in result.rows)
    assert "Validation bits per byte against training tokens" in (tmp_path / "out" / "report.html").read_text()


def test_files_of_other_paths_are_other_data(tmp_path):
    paths = [
        write_run(tmp_path / name, "kda", data="files", settings={"data": {"source": "files", "paths": [f"{name}/*"]}})
        for name in "ab"
    ]
    result = read(paths)
    assert "The data differ: files (a/*); files (b/*). Only rows of the same data can be compared." in result.notes


def test_other_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    paths = [write_run(tmp_path / "a", "kda"), write_run(tmp_path / "b", "softmax", unigram_entropy=5.0)]
    result = read(paths)
    assert "The tokenizers differ, so compare bits per byte and not the loss per token." in result.notes
    assert not any("val/loss" in row for row in result.rows)


@pytest.mark.usefixtures("undrawn")
def test_runs_of_one_name_and_runs_of_one_seed_are_told_apart(tmp_path):
    """The jobs of every sweep are called 0, 1, ..."""
    paths = [write_run(tmp_path / sweep / "0", "kda") for sweep in ("a", "b")]
    result = compare([*paths, write_run(tmp_path / "1", "kda", seed=1)], tmp_path / "out", title="t")
    assert [run.name for run in result.runs] == ["1", "a/0", "b/0"]
    assert any("have the same seed and settings: kda (seed 0, 2 times)." in note for note in result.notes)
    copies = [write_run(tmp_path / f"c{seed}_{n}", "kda", seed=seed) for seed in range(9) for n in (0, 1)]
    many = read(copies)
    assert any("(seed 4, 2 times); and 4 more. If they are copies" in note for note in many.notes)
    marks = many.tradeoff.charts()[0].spec["data"]["values"]
    assert marks[-1]["seed"] == "0, 0, 1, 1, 2, 2, 3, 3, ... (18 in all)"
    again = read([tmp_path / "out" / "results.json"])
    assert [run.name for run in again.runs] == ["1", "a/0", "b/0"]


def test_a_label_says_only_what_differs_between_runs_of_its_mixer(tmp_path):
    paths = [
        write_run(tmp_path / name, mixer, settings={"mixer": {"kda": {"gate": gate}}})
        for name, mixer, gate in (("a", "kda", "channel"), ("b", "kda", "none"), ("c", "kda_mla_3to1", "channel"))
    ]
    labels = {group.label for group in group_runs([read_run(path) for path in paths])}
    assert labels == {"kda · gate channel", "kda · gate none", "kda_mla_3to1"}


def test_labels_that_would_be_long_name_only_what_differs_from_the_commonest(tmp_path):
    """An ablation changes one part in each run."""
    plain = {"gate": "channel", "conv_width": 4, "output_gate": True}
    changed = ({}, {"gate": "none"}, {"conv_width": 0}, {"output_gate": False})
    runs = [
        read_run(write_run(tmp_path / str(n), "kda", settings={"mixer": {"kda": plain | one}}))
        for n, one in enumerate(changed)
    ]
    groups = {group.label: group for group in group_runs(runs)}
    assert set(groups) == {"kda", "kda · gate none", "kda · conv_width 0", "kda · output_gate False"}
    assert set(groups["kda"].unnamed) == {"gate channel", "conv_width 4", "output_gate True"}
    assert set(groups["kda · gate none"].unnamed) == {"conv_width 4", "output_gate True"}
    said = " ".join(Comparison("Parts", runs, [], []).notes)
    assert "kda without a setting has conv_width 4, gate channel, output_gate True." in said


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param(  # nothing was logged between validations
            "step,tokens,seconds,val/loss,val/bits_per_byte\n20,10,2,4.0,1.6\n", marks=pytest.mark.long
        ),
        "step,tokens,seconds,train/loss,train/bits_per_byte,val/loss,val/bits_per_byte\n10,5,1,nan,nan,inf,inf\n"
        "20,10,2,4.0,1.6,4.0,1.6\n",  # a step that nearly diverged
        pytest.param(  # cut in the middle of a row
            "step,tokens,seconds,val/loss,val/bits_per_byte\n20,10,2,4.0,1.6\n40,20,", marks=pytest.mark.long
        ),
    ],
)
def test_a_course_with_gaps_is_compared(tmp_path, metrics):
    paths = [write_run(tmp_path / mixer, mixer) for mixer in ("kda", "softmax")]
    (paths[0] / "metrics.csv").write_text(metrics)
    result = compare(paths, tmp_path / "out", title="t")
    assert len(result.runs) == 2
    assert "NaN" not in (tmp_path / "out" / "report.html").read_text().partition('id="charts">')[2].partition("<")[0]


@pytest.mark.slow
def test_charts_of_an_earlier_comparison_in_the_same_directory_are_removed(tmp_path, runs):
    compare(runs[:2], tmp_path, title="t")
    (tmp_path / "mine.png").touch()
    of_time = {"front_by_speed.png", "front_by_speed.svg", "curves_by_seconds.png", "loss_by_seconds.png"}
    assert of_time <= {path.name for path in tmp_path.iterdir()}
    compare(runs[:2], tmp_path, title="t", exclusive_device=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert not of_time & left
    assert {"mine.png", "loss_by_tokens.png", "front_by_state.svg", "report.html"} <= left


@pytest.mark.long
def test_of_runs_that_shared_a_device_nothing_of_time_is_compared(tmp_path, runs):
    result = compare(runs, tmp_path / "out", title="t", exclusive_device=False)
    assert "Runs shared a device, so times are not compared." in result.notes
    assert result.rows
    assert not any("tokens_per_s" in row or "bits_at_equal_wall_clock" in row for row in result.rows)
    (tmp_path / "out" / "table.md").unlink()
    redraw(tmp_path / "out" / "results.json")  # as it was written
    assert "tokens/s" not in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "loss_by_seconds.png").exists()


def test_a_course_with_few_validations_is_drawn_by_the_training_loss(tmp_path):
    seldom = group_runs([read_run(write_run(tmp_path / "a", "kda", every=500))])
    (tmp_path / "a.png").write_bytes(loss_curves(seldom, x="tokens", y="val/loss").light)
    assert coloured(tmp_path / "a.png").any(axis=0).mean() > 0.5  # a line, not the one point


def test_a_plot_of_several_seeds_says_what_its_bands_are(tmp_path):
    runs = [read_run(write_run(tmp_path / f"seed{seed}", "kda", seed=seed)) for seed in (1, 2)]
    for several in (True, False):
        drawn = loss_curves(group_runs(runs if several else runs[:1]), x="tokens", y="val/loss")
        said = drawn.draw(LIGHT).axes[0].get_title(loc="left")
        assert ("Bands: from the best to the worst seed." in said) == several


def test_many_models_have_a_line_each_and_the_one_that_others_are_variants_of_is_marked(tmp_path):
    plain = {"gate": "channel", "conv_width": 4, "output_gate": True}
    changed = [{}, {"gate": "none"}, {"output_gate": False}, *({"conv_width": n} for n in (0, 1, 2, 3, 5))]
    runs = [
        read_run(write_run(tmp_path / f"{n}", "kda", settings={"mixer": {"kda": plain | one}}))
        for n, one in enumerate(changed)
    ]
    assert loss_by_model(group_runs(runs), y="val/loss") is None
    runs.append(read_run(write_run(tmp_path / "softmax", "softmax")))
    groups = group_runs(runs)
    (axes,) = loss_by_model(groups, y="val/loss").draw(LIGHT).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [group.label for group in sorted(groups, key=lambda group: group.mean("val/loss"))]
    assert len(names) == 9
    assert axes.yaxis_inverted()  # the best is on top
    assert axes.get_title(loc="left") == "Dashed: kda."


def configuration(**changes):
    others = {"title": "t", "bench": None, "step": None, "exclusive_device": True, "wandb": None}
    return OmegaConf.create(others | changes)


@pytest.mark.slow
def test_the_command_prints_the_table_and_what_was_left_out(tmp_path, runs, capsys):
    (tmp_path / "nothing").mkdir()
    home = runs[0].parent
    compare_command(configuration(runs=[f"{home}/k*", f"{tmp_path}/n*"], out=f"{tmp_path}/out"))
    shown = capsys.readouterr().out
    assert "kda_mla_3to1" in shown
    assert "softmax" not in shown
    assert "nothing: no summary.json: not a run" in shown
    assert f"{tmp_path}/out/report.html" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": "{}/non*"}, r"runs=.*/non\* matches nothing; give run directories"),
        (
            {"runs": "{}"},
            r"no finished run in the paths of runs \(.*no summary.json: not a run\); give .* summary.json\.$",
        ),
        ({"runs": "{runs}"}, r"no finished run in .*not a run\); give the directories .*, as in runs='.*/\*'\.$"),
        ({"out": "{}/file"}, r"out=.*/file: .*/file is a file, and a directory is expected"),
        ({"bench": "{}/file"}, r"file cannot be read as JSON"),
        ({"bench": "{}/missing"}, r"bench=.*/missing matches nothing; give results of scripts/benchmark.py"),
        ({"bench": "{}/empty"}, r"bench=.*/empty holds no results of scripts/benchmark.py \(benchmark, step_benchmark"),
        (
            {"bench": "{}/table.json"},
            r"table.json is of the kind table, and one of benchmark, step_benchmark, decode, notes is",
        ),
        ({"bench": "{}/decode.json"}, r"decode.json is not what scripts/benchmark.py writes \(KeyError\('title'\)\)"),
        ({"bench": []}, r"bench is empty: give results of scripts/benchmark.py"),
    ],
)
def test_bad_input_gets_one_clear_error(tmp_path, runs, changes, message):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.json").write_text('{"kind": "table", "rows": []}')
    row = '{"implementation": "lkda", "model": "small", "mixer": "kda"}'
    (tmp_path / "decode.json").write_text(f'{{"kind": "decode", "header": {{}}, "rows": [{row}]}}')
    given = {"runs": f"{runs[0].parent}/*", "out": "{}/out"} | changes
    config = configuration(
        **{name: value and value.format(tmp_path, runs=runs[0].parent) for name, value in given.items()}
    )
    with pytest.raises(ValueError, match=message):
        compare_command(config)


@pytest.mark.long
def test_a_directory_that_is_given_twice_is_one_run(tmp_path, runs):
    compare_command(configuration(runs=[str(runs[0]), f"{runs[1]}/../{runs[0].name}"], out=f"{tmp_path}/out"))
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 1


@pytest.mark.long
def test_the_script_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, str(SCRIPT), f"runs={tmp_path}/*", f"out={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs=")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_readme_blocks_are_filled_from_results(compared):
    results = compared[1].parent
    text = "before\n<!-- results:out -->\nold\n<!-- /results:out -->\nafter\n"
    filled = fill(text, results)
    assert "old" not in filled
    assert "| kda_mla_3to1 |" in filled
    assert "6 runs on cpu, 2 threads." in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert fill(filled, results) == filled
    with pytest.raises(ValueError, match="the block results:none needs"):
        fill(text.replace(":out", ":none"), results)


def test_bits_per_byte_at_the_time_of_the_fastest_run(tmp_path):
    runs = [read_run(write_run(tmp_path / mixer, mixer)) for mixer in ("kda", "softmax")]
    groups = group_runs(runs)
    seconds = equal_wall_clock(groups)
    assert seconds == min(run.summary["tokens"] / run.summary["tokens_per_s"] for run in runs)
    for row, group in zip(rows(groups), groups):
        course = [
            (r["tokens"] / group.runs[0].summary["tokens_per_s"], r["val/bits_per_byte"])
            for r in group.runs[0].metrics
            if "val/loss" in r
        ]
        before, after = [p for p in course if p[0] <= seconds][-1], next(p for p in course if p[0] >= seconds)
        low, high = sorted((before[1], after[1]))
        assert low <= row["bits_at_equal_wall_clock"] <= high
    assert equal_wall_clock(groups[:1]) is None
    elsewhere = dataclasses.replace(runs[1], summary=runs[1].summary | {"device": "another"})
    assert equal_wall_clock(group_runs([runs[0], elsewhere])) is None


def test_the_compilation_in_the_first_step_is_no_time_of_training(tmp_path):
    """It is longer for the run that comes first, whose compiled code the others find."""
    runs = [read_run(write_run(tmp_path / mixer, mixer)) for mixer in ("kda", "softmax")]
    later = [row | {"seconds": row["seconds"] + 20} for row in runs[0].metrics]
    slow_start = dataclasses.replace(runs[0], metrics=later)
    assert rows(group_runs([slow_start, runs[1]])) == rows(group_runs(runs))
    assert mean_curve([slow_start], "seconds", "val/loss") == mean_curve(runs[:1], "seconds", "val/loss")


def with_test(loss: float) -> dict[str, float]:
    return {"test/loss": loss, "test/bits_per_byte": loss / 2.5, "test/perplexity": 2 * loss}


@pytest.mark.slow
def test_figures_are_of_the_test_split_where_every_run_has_one(tmp_path):
    """Softmax validates worse and tests better."""
    paths = [
        write_run(tmp_path / mixer, mixer, **with_test(loss))
        for mixer, loss in (("kda_mla_3to1", 4.5), ("softmax", 4.25))
    ]
    result = compare(paths, tmp_path / "out", title="t")
    assert [row["mixer"] for row in result.rows] == ["softmax", "kda_mla_3to1"]
    head, first = ((tmp_path / "out" / "table.md").read_text().splitlines()[n].split(" | ") for n in (0, 2))
    shown = dict(zip(head, first))
    assert [shown[name] for name in ("test loss", "test bits/byte", "test perplexity")] == ["4.250", "1.700", "8.5"]
    assert not {"val loss", "bits/byte", "perplexity"} & set(head)
    assert any("Columns named test are of the test split, which is measured once" in note for note in result.notes)
    assert "val/loss" in (tmp_path / "out" / "table.csv").read_text()


def test_where_a_run_has_no_test_split_all_are_compared_by_validation(tmp_path):
    paths = [write_run(tmp_path / "a", "kda_mla_3to1"), write_run(tmp_path / "b", "softmax", **with_test(4.0))]
    result = read(paths)
    assert [row["mixer"] for row in result.rows] == ["kda_mla_3to1", "softmax"]
    head, _ = as_cells(result.rows)
    assert "test loss" in head
    assert "val loss" in head
    assert "1 of the 2 runs has a test split. Columns not named test are of the validation split." in result.notes


def test_a_run_that_is_read_at_an_earlier_step_has_no_test_figures(tmp_path):
    path = write_run(tmp_path / "a", "kda", **with_test(4.0))
    assert not [name for name in read_run(path, step=200).summary if name.startswith("test")]
    assert read_run(path).summary["test/loss"] == 4.0
