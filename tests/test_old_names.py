"""Results files and summaries of earlier versions are read as if they were written today, with the same numbers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lkda.checks import InputError
from lkda.old_names import _COMMANDS, DATA_MODULES, main, translated_results, with_data_name
from lkda.report.operators.benchmark import read_benchmark
from lkda.report.read.evaluations import read_evaluations
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import read_run
from lkda.report.training.comparison import read_comparison
from tests.report.conftest import bench_row, write_run

PART = {"length": 64, "pairs": 4, "accuracy": 0.5, "sequence_accuracy": 0.25, "loss": 1.0, "state_bytes": 100}
SUBSET = {
    **{"name": "length_64_pairs_4", "subset": {"length": 64, "pairs": 4}},
    **{"accuracy": 0.5, "sequence_accuracy": 0.25, "loss": 1.0, "state_bytes": 100},
}


RESULTS = Path(__file__).parents[1] / "docs" / "results"
OLD_KEYS = {"floor_ms", "fraction_of_floor", "alone", "bits_at_same_time", "kept"}
OLD_SCHEDULER = {"name": "constant", "warmup_steps": 100, "final": 0.1, "decay": 0.2}
SCHEDULER = {"name": "constant", "warmup_steps": 100, "min_lr_ratio": 0.1, "decay_fraction": 0.2}


def entries(found):
    """The keys and values of nested lists and dictionaries."""
    for key, value in found.items() if isinstance(found, dict) else ((None, value) for value in found):
        yield key, value
        if isinstance(value, (dict, list)):
            yield from entries(value)


def old_row(**changes):
    row = bench_row(**changes)
    row["floor_ms"], row["fraction_of_floor"] = row.pop("lower_bound_ms"), 0.3
    del row["noisy"]
    return row


def write(path, found):
    path.write_text(json.dumps(found))
    return path


def test_a_benchmark_has_lower_bounds_and_says_what_is_noisy(tmp_path):
    rows = [
        old_row(),
        old_row(ms_p20=0.1, ms_p80=0.3),
        old_row(backend=None, peer="sdpa"),
        old_row(backend=None, peer="x", ms=None, reason="not installed"),
    ]
    path = write(tmp_path / "benchmark.json", {"kind": "benchmark", "header": {}, "rows": rows})
    found = read_benchmark(path).rows
    assert [(row["lower_bound_ms"], row["fraction_of_lower_bound"]) for row in found] == [(0.056, 0.3)] * 4
    assert not {key for row in found for key in row if "floor" in key}
    assert [row.get("noisy") for row in found] == [False, True, False, None]
    assert [row["peer"] for row in found] == [None, None, "softmax attention (SDPA)", "x"]


def test_one_thread_is_no_number_of_threads(tmp_path):
    """The name of a device, and the note of a table."""
    before = {"kind": "table", "note": "0.4M tokens; cpu, 1 threads, torch 2.13", "rows": [{"on": "cpu, 11 threads"}]}
    after = before | {"note": "0.4M tokens; cpu, 1 thread, torch 2.13"}
    assert read_results_file(write(tmp_path / "table.json", before)) == after
    (tmp_path / "deep.json").write_text('{"kind": "table", "rows": ' + 600 * "[" + 600 * "]" + "}")
    with pytest.raises(InputError, match="RecursionError"):
        read_results_file(tmp_path / "deep.json")
    run = write_run(tmp_path / "run", "kda", device="cpu, 1 threads")
    assert read_run(run).summary["device"] == "cpu, 1 thread"


def test_a_comparison_has_subsets_and_says_whether_devices_were_shared(tmp_path):
    summary = {"mixer": "kda", "parts": [PART]}
    record = {"name": "a", "config": {}, "summary": summary, "metrics": []}
    old = {"kind": "comparison", "title": "t", "notes": [], "runs": [record], "skipped": [], "alone": False}
    old |= {"benchmark": {"header": {}, "rows": [old_row()]}, "rows": [{"bits_at_same_time": 1.5}]}
    path = write(tmp_path / "results.json", old)
    found = read_comparison(path)
    assert found.exclusive_device is False
    assert found.runs[0].summary == {"mixer": "kda", "val_subsets": [SUBSET]}
    assert found.benchmark is not None
    assert found.benchmark.rows[0]["lower_bound_ms"] == 0.056
    assert read_results_file(path)["rows"] == [{"bits_at_equal_wall_clock": 1.5}]


def test_a_comparison_names_data_as_they_are_called_today(tmp_path):
    data = {"_target_": "lkda.data.mqar_kimi.KimiMQAR"}
    runs = [
        {"name": name, "config": config, "summary": {"mixer": "kda", "data": name}, "metrics": []}
        for name, config in {"mqar_kimi": {"data": data}, "stack": {"data": {}}}.items()
    ]
    rows = [{"mixer": "kda · mqar_kimi · lr 0.001"}, {"mixer": "kda · stack"}]
    old = {"kind": "comparison", "runs": runs, "rows": rows, "benchmarks": []}
    found = translated_results(old)
    assert [run["summary"]["data"] for run in found["runs"]] == ["mqar_answered", "stack"]
    assert [row["mixer"] for row in found["rows"]] == ["kda · mqar_answered · lr 0.001", "kda · stack"]
    assert translated_results(found) == found


def test_recorded_settings_have_todays_names_and_nothing_is_added_or_left_out():
    config = {"data": {"_target_": "lkda.data.stack.Stack"}, "scheduler": OLD_SCHEDULER, "model": {"num_heads": 2}}
    today = config | {"data": {"_target_": "lkda.data.synthetic.stack.Stack"}, "scheduler": SCHEDULER}
    run = {"name": "a", "config": config, "summary": {"mixer": "kda"}, "metrics": []}
    found = translated_results({"kind": "comparison", "runs": [run], "rows": [], "benchmarks": []})
    assert found["runs"][0]["config"] == today
    peers = translated_results({"kind": "peer_training", "peers": [{"peer": "llama", "settings": config}]})
    assert peers["peers"] == [{"peer": "llama", "settings": today}]


def test_the_mqar_of_today_keeps_its_name():
    config = {"data": {"_target_": "lkda.data.synthetic.mqar_kimi.ConsecutiveMQAR"}}
    assert with_data_name({"data": "mqar_kimi"}, config) == {"data": "mqar_kimi"}


def test_a_run_directory_has_subsets(tmp_path):
    summary = {"val/accuracy": 0.5, "val/bits_per_byte": None, "context": 64, "learning_rate": 1e-3}
    run = write_run(tmp_path / "a", "kda", parts=[PART], **summary)
    summary = read_run(run).summary
    assert summary["val_subsets"] == [SUBSET]
    assert "parts" not in summary


def test_an_evaluation_has_subsets_instead_of_names_to_take_apart(tmp_path):
    result = {"accuracy": 0.5, "sequence_accuracy": 0.25, "loss": 1.0}
    flat = {f"{metric}/length_64_pairs_4": value for metric, value in result.items()}
    flat |= {"accuracy/length_2048_depth_50_needles_1": 0.75, "loss_from_128": 3.0}
    old = {"kind": "evaluation", "run": {"mixer": "kda"}, "data": {}, "result": result | flat}
    (found,) = read_evaluations([write(tmp_path / "a.json", old)])
    assert found["result"] == result | {
        "loss_from_128": 3.0,
        "val_subsets": [
            {key: x for key, x in SUBSET.items() if key != "state_bytes"},
            {
                **{"name": "length_2048_depth_50_needles_1", "accuracy": 0.75},
                "subset": {"length": 2048, "depth": 50, "needles": 1},
            },
        ],
    }


def test_an_evaluation_names_the_subsets_and_the_data_of_its_run_as_today():
    run = {"mixer": "kda", "data": "mqar_kimi", "parts": [{"length": 64, "examples": 8}]}
    old = {"run": run, "data": {"_target_": "lkda.data.mqar_kimi.KimiMQAR"}, "result": {"loss": 1.0}}
    found = translated_results({"kind": "state_dtypes", "evaluations": [old]})
    assert found["evaluations"] == [
        {
            "run": {"mixer": "kda", "data": "mqar_answered", "val_subsets": [{"length": 64, "examples": 8}]},
            "data": {"_target_": "lkda.data.synthetic.mqar_answered.AnsweredMQAR"},
            "result": {"loss": 1.0},
        }
    ]
    assert translated_results(found) == found


def test_committed_results_have_the_names_of_today():
    paths = sorted(RESULTS.glob("**/*.json"))
    assert len(paths) > 70
    for path in paths:
        found = json.loads(path.read_text())
        assert translated_results(found) == found, path
        old = {key for key, _ in entries(found)} & OLD_KEYS
        old |= {value for key, value in entries(found) if key == "_target_" and value in DATA_MODULES}
        old |= {name for key, value in entries(found) if key == "scheduler" for name in {"final", "decay"} & {*value}}
        if found["kind"] != "measurements":  # parts.json lists the parts of a whole set
            old |= {key for key, _ in entries(found) if key == "parts"}
        assert not old, path


@pytest.mark.parametrize("kind", ["table", "measurements", "of the future"])
def test_other_kinds_are_left_as_they_are(kind):
    found = {"kind": kind, "rows": [{"floor_ms": 1}], "alone": 2}
    assert translated_results(found) == found


def test_the_commands_of_a_table_name_the_modules_of_today():
    found = {"kind": "table", "commands": ["python -m lkda.commands.grid lkda.commands.grids", "lkda train"]}
    commands = translated_results(found)["commands"]
    assert commands == ["python -m lkda.commands.sweeps.grid lkda.commands.grids", "lkda train"]


def test_renamed_modules_exist():
    missing = [new for old, new in _COMMANDS.items() if find_spec(new) is None or find_spec(old) is not None]
    assert missing == []


def test_files_are_rewritten_once(tmp_path, capsys):
    path = write(tmp_path / "a.json", {"kind": "benchmark", "header": {"x": 0.1}, "rows": [old_row()]})
    main([str(path)])
    assert "rewritten" in capsys.readouterr().out
    written = path.read_text()
    assert json.loads(written)["rows"][0]["lower_bound_ms"] == 0.056
    main([str(path)])
    assert path.read_text() == written
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["[1]", "{", '{"kind": "benchmark"}'])
def test_what_is_no_results_file_is_named(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SystemExit, match=r"a.json is not a results file"):
        main([str(tmp_path / "a.json")])
    assert (tmp_path / "a.json").read_text() == text
