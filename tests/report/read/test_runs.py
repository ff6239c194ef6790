"""Run directories -> runs and groups."""

from __future__ import annotations

import datetime
import json
import statistics

import pytest

from lkda.report.draw.curves import mean_curve, running_mean
from lkda.report.read.groups import also_differing, group_runs
from lkda.report.read.runs import RECORDED_ROWS, Run, as_record, from_record, read_run, read_runs
from lkda.report.training import table
from tests.report.conftest import FLOOR, write_run


def labels(paths):
    return {group.label for group in group_runs(read_runs(paths)[0])}


def test_seeds_are_one_row_with_mean_and_spread(runs):
    found, skipped = read_runs(runs)
    rows = {row["mixer"]: row for row in table.rows(group_runs(found))}
    assert skipped == []
    assert list(rows) == sorted(FLOOR, key=FLOOR.__getitem__)
    losses = [run.summary["val/loss"] for run in found if run.summary["mixer"] == "kda"]
    assert rows["kda"]["seeds"] == 3
    assert rows["kda"]["val/loss"] == pytest.approx(statistics.fmean(losses))
    assert rows["kda"]["val/loss sd"] == pytest.approx(statistics.stdev(losses))
    assert rows["kda"]["tokens_per_s"] == 7100
    assert rows["kda"]["tokens_per_s sd"] == 100
    assert "val/loss sd" not in rows["softmax"]


def spoil(run, name, text):
    if text is None:
        (run / name).unlink()
    else:
        (run / name).write_text(text)
    return run


def test_what_is_no_finished_run_is_left_out_by_name_with_the_reason(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_run(tmp_path / "stopped", "kda", status="interrupted")
    write_run(tmp_path / "diverged", "kda", status="diverged")
    write_run(tmp_path / "poor", "kda", state_bytes=None)
    write_run(tmp_path / "infinite", "kda", **{"val/loss": float("inf")})
    for name, spoilt, text in (
        ("torn", "summary.json", '{"mixer": "k'),
        ("running", "summary.json", None),
        ("list", "summary.json", "[1]"),
        ("unset", "config.yaml", None),
        ("odd", "config.yaml", "a: [1"),
        ("bare", "metrics.csv", None),
        ("untested", "metrics.csv", "step,tokens,seconds,train/loss\n1,1,1,9.0\n"),
        ("inf", "metrics.csv", "step,tokens,seconds,val/loss\n1,1,1,inf\n"),
        ("words", "metrics.csv", "step,tokens\none,two\n"),
    ):
        spoil(write_run(tmp_path / name, "kda"), spoilt, text)
    (spoil(write_run(tmp_path / "bytes", "kda"), "summary.json", "") / "summary.json").write_bytes(b"\xff\xfe")
    write_run(tmp_path / "still", "kda", tokens_per_s=0)
    write_run(tmp_path / "wordy", "kda", context="long")
    write_run(tmp_path / "seeds", "kda", settings={"trainer": [1]})
    write_run(tmp_path / "dated", "kda", settings={"data": {"since": datetime.date(2020, 1, 1)}})
    found, skipped = read_runs([path for path in tmp_path.iterdir() if path.name != "runs"] + runs)
    assert len(found) == len(runs)
    assert {path.name: reason.split(" (")[0] for path, reason in skipped} == {
        "bare": "no metrics.csv",
        "bytes": "summary.json cannot be read",
        "diverged": "the run is diverged, not finished",
        "empty": "no summary.json: not a run",
        "file": "not a directory",
        "inf": "metrics.csv holds no validation",
        "infinite": "summary.json lacks val/loss",
        "list": "summary.json holds no table of values",
        "odd": "config.yaml is not YAML",
        "poor": "summary.json lacks state_bytes",
        "running": "no summary.json: still running, or killed",
        "still": "summary.json has tokens_per_s = 0, and a number above 0 is needed",
        "seeds": "config.yaml has trainer = [1], and a section of settings is needed",
        "dated": "config.yaml is damaged: it holds a value of a wrong kind",
        "wordy": "summary.json has context = 'long', and a number is needed",
        "stopped": "the run is interrupted, not finished",
        "torn": "summary.json is not JSON",
        "unset": "no config.yaml",
        "untested": "metrics.csv holds no validation",
        "words": "metrics.csv cannot be read",
    }


def test_a_label_says_what_tells_a_group_from_the_others_of_its_mixer(tmp_path):
    fast = {"optimizer": {"name": "adamw", "lr": 0.008}}
    paths = [
        write_run(tmp_path / "a", "kda"),
        write_run(tmp_path / "b", "kda", seed=1),
        write_run(tmp_path / "c", "kda", settings=fast),
        write_run(tmp_path / "d", "softmax", settings=fast),
    ]
    assert labels(paths) == {"kda · lr 0.004", "kda · lr 0.008", "softmax · lr 0.008"}


def test_an_option_of_the_mixer_makes_another_group(tmp_path):
    by_head = {"mixer": {"name": "kda", "pattern": ["kda"], "kda": {"gate": "head"}}}
    paths = [
        write_run(tmp_path / "a", "kda", settings={"mixer": by_head["mixer"] | {"kda": {"gate": "channel"}}}),
        write_run(tmp_path / "b", "kda", settings=by_head),
        write_run(tmp_path / "c", "softmax"),
    ]
    assert labels(paths) == {"kda · gate channel", "kda · gate head", "softmax"}


def test_a_setting_is_named_before_the_tokens_that_follow_from_it(tmp_path):
    """The run that is read first does not have the setting. With one of its values, training ended early."""
    mixer = {"name": "softmax", "pattern": ["softmax"]}
    paths = [write_run(tmp_path / "a", "kda")]
    for base, tokens in ((10_000.0, 1_024_000), (None, 64_000)):
        settings = {"mixer": mixer | {"softmax": {"rope_base": base}}}
        paths.append(write_run(tmp_path / f"b{base}", "softmax", settings=settings, tokens=tokens))
    assert labels(paths) == {"kda", "softmax · rope_base None", "softmax · rope_base 10000.0"}


def test_a_pattern_is_named_by_its_layers(tmp_path):
    paths = [
        write_run(tmp_path / "a", "softmax"),
        write_run(tmp_path / "b", "softmax", settings={"mixer": {"name": "softmax", "pattern": ["conv", "softmax"]}}),
    ]
    assert labels(paths) == {"softmax · pattern softmax", "softmax · pattern conv, softmax"}


def test_a_backend_is_named_where_a_mixer_ran_on_several(tmp_path):
    paths = [write_run(tmp_path / backend, "kda", backend=backend) for backend in ("chunk", "cuda")]
    assert labels([*paths, write_run(tmp_path / "a", "softmax")]) == {"kda · chunk", "kda · cuda", "softmax"}


def test_the_name_of_a_model_stands_for_all_its_sizes(tmp_path):
    small = {"model": {"name": "small", "d_model": 512, "num_layers": 8}}
    paths = [write_run(tmp_path / "a", "kda"), write_run(tmp_path / "b", "kda", settings=small)]
    assert labels(paths) == {"kda · tiny", "kda · small"}


def test_what_differs_between_mixers_besides_the_mixer_is_told(tmp_path, runs):
    assert also_differing(read_runs(runs)[0]) == []
    fast = {"optimizer": {"name": "adamw", "lr": 0.008}}
    paths = [write_run(tmp_path / "a", "kda"), write_run(tmp_path / "b", "softmax", settings=fast, tokens=5)]
    assert also_differing(read_runs(paths)[0]) == ["optimizer.lr", "tokens"]


def test_the_mean_curve_runs_between_the_best_and_the_worst_seed(tmp_path):
    runs = [read_run(write_run(tmp_path / str(seed), "kda", seed=seed)) for seed in range(3)]
    curve = mean_curve(runs, "tokens", "val/loss")
    assert curve.x == [step * 2048 for step in (100, 200, 300, 400, 500)]
    ends = [run.summary["val/loss"] for run in runs]
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((min(ends), max(ends)))
    assert curve.y[-1] == pytest.approx(statistics.fmean(ends))


def test_the_running_mean_keeps_a_line_and_calms_the_noise(tmp_path):
    curve = mean_curve([read_run(write_run(tmp_path / "a", "kda"))], "tokens", "train/loss")
    calm = running_mean(curve)
    assert calm.x == curve.x
    jumps = [abs(b - a) for values in (curve.y, calm.y) for a, b in zip(values[30:], values[31:])]
    assert statistics.fmean(jumps[len(jumps) // 2 :]) < 0.7 * statistics.fmean(jumps[: len(jumps) // 2])


def test_a_long_course_is_recorded_thinly_but_with_every_validation():
    rows = [{"step": n, "train/loss": 1.0} for n in range(1, 10_001)]
    rows += [{"step": n, "val/loss": 1.0} for n in range(100, 10_001, 100)]
    kept = from_record(as_record(Run("long", {}, {}, rows))).metrics
    training = [row for row in kept if "train/loss" in row]
    assert len(kept) - len(training) == 100
    assert 0.9 * RECORDED_ROWS < len(training) <= RECORDED_ROWS
    assert training[-1]["step"] > 9_900


def test_a_short_course_is_recorded_whole(tmp_path):
    run = read_run(write_run(tmp_path / "a", "kda"))
    assert from_record(as_record(run)) == run


def test_runs_of_earlier_comparisons_are_read_again(tmp_path, runs):
    path, other = tmp_path / "results.json", tmp_path / "other.json"
    recorded = [as_record(run) for run in read_runs(runs[:2])[0]]
    path.write_text(json.dumps({"kind": "comparison", "rows": [], "benchmarks": [], "runs": recorded}))
    other.write_text('{"kind": "table", "rows": [], "note": ""}')
    found, skipped = read_runs([path, runs[2], other])
    assert sorted(run.summary["mixer"] for run in found) == ["kda", "simplified", "softmax"]
    assert [str(place) for place, _ in skipped] == [str(other)]
    assert "is of the kind table, and comparison is needed" in skipped[0][1]
    assert {run.summary["at_step"] for run in read_runs([path], step=400)[0]} == {400}


def test_a_loss_whose_perplexity_no_number_holds_is_read(tmp_path):
    path = write_run(tmp_path / "a", "kda")
    (path / "metrics.csv").write_text("step,tokens,seconds,val/loss\n200,4096,1,5.0\n400,8192,2,1000.0\n")
    assert read_run(path, step=400).summary["val/perplexity"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["runs"].clear(), "it holds no runs"),
        (lambda found: found["runs"][0]["summary"].pop("tokens"), "summary.json lacks tokens"),
        (lambda found: found["runs"][0]["metrics"][0].update(tokens="x"), "metrics.csv has a value that is no number"),
        (lambda found: found["runs"][0].update(metrics=None), "is damaged: it holds a value of a wrong kind"),
        (lambda found: found["runs"][0].update(config=[]), "is not what its kind, comparison, says"),
    ],
)
def test_a_damaged_comparison_is_left_out_with_the_reason(tmp_path, change, message):
    record = as_record(read_run(write_run(tmp_path / "a", "kda")))
    found = {"kind": "comparison", "runs": [record], "rows": [], "benchmarks": []}
    change(found)
    (tmp_path / "results.json").write_text(json.dumps(found))
    ((_, reason),) = read_runs([tmp_path / "results.json"])[1]
    assert message in reason
