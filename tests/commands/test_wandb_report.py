"""scripts/compare.py wandb=PROJECT: what W&B holds offline is what the page shows."""

from __future__ import annotations

import csv
import json

import pytest

from lkda.commands.compare import compare
from lkda.commands.wandb_report import _panels, offline_runs, sync_command
from lkda.report.tradeoff import charts
from tests.commands.small import composed
from tests.report.conftest import write_run
from tests.training.wandb_records import history, records


@pytest.fixture(scope="module")
def sent(bench, tmp_path_factory):
    """The directory of a comparison that was sent, and the directories of its runs; two of them were made offline."""
    home = tmp_path_factory.mktemp("sent")
    runs = [
        write_run(home / "runs" / f"{mixer}_{seed}", mixer, seed=seed, model="tiny")
        for mixer in ("kda", "softmax")
        for seed in (0, 1)
    ]
    for run in runs[:2]:
        (run / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    (runs[1] / "wandb" / "offline-run-1-abc" / "run-abc.wandb.synced").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        compare(composed("compare", f"runs={home}/runs/*", f"out={home}/out", f"bench={bench}", "wandb=mine"))
    return home / "out", runs


@pytest.fixture(scope="module")
def found(sent):
    (process,) = records(sent[0])
    return process


@pytest.fixture(scope="module")
def media(sent, found):
    """{key: file} of what was logged."""
    (row,) = history(found)
    (directory,) = (sent[0] / "wandb").glob("offline-run-*")
    ending = ".path"
    return {key.removesuffix(ending): directory / "files" / row[key] for key in row if key.endswith(ending)}


@pytest.mark.slow
def test_the_run_is_a_report(found):
    (run,) = (record["run"] for record in found if record["type"] == "run")
    assert (run["project"], run["job_type"], run["run_group"]) == ("mine", "report", "report")
    assert run["config"]["update"]["runs"] == ["kda_0", "kda_1", "softmax_0", "softmax_1"]
    summary = [record["summary"] for record in found if record["type"] == "summary"]
    assert "With 1.02M training tokens, choose kda" in json.dumps(summary)


@pytest.mark.slow
def test_the_tables_hold_the_numbers_of_the_page(sent, media):
    out, _ = sent
    tables = {name.partition("/")[2] for name in media if name.startswith("tables/")}
    assert tables == {"which_mixer", "runs", "crossings", "measurements"}
    first = json.loads(media["tables/which_mixer"].read_text())
    assert {line[1] for line in first["data"]} == {
        None,
        1024,
        2000,
        2048,
        4000,
        4096,
        16_000,
    }  # of accuracy: no context
    crossings = json.loads(media["tables/crossings"].read_text())
    written = list(csv.DictReader((out / "crossings.csv").open()))
    assert crossings["columns"] == list(written[0])
    at = crossings["columns"].index("from context")
    assert [line[at] for line in crossings["data"]] == [
        pytest.approx(float(line["from context"])) if line["from context"] else None for line in written
    ]
    measured = json.loads(media["tables/measurements"].read_text())
    speeds = [line[measured["columns"].index("tokens/s")] for line in measured["data"]]
    assert None in speeds
    assert 1000.0 in speeds


@pytest.mark.slow
def test_every_chart_of_the_page_is_a_vega_chart_with_its_data(sent, found, media):
    config = json.dumps([record for record in found if record["type"] == "config"])
    charts = {"front_by_speed", "front_by_state", "curves_by_tokens", "curves_by_seconds", "decode_time", "kernel_time"}
    keys = [name for name in media if name.endswith("_table")]
    assert {key.split("/")[0] for key in keys} >= charts
    for key in keys:
        assert key.removesuffix("_table") in config.replace("\\", "")
    assert "wandb/line/v0" in config
    assert "wandb/scatter/v0" in config
    (key,) = (key for key in keys if key.startswith("decode_time/"))
    decode = json.loads(media[key].read_text())
    speeds = [dict(zip(decode["columns"], line, strict=True)) for line in decode["data"]]
    assert {line["tokens/s"] for line in speeds if line["mixer"] == "kda"} == {1000.0}
    assert media["report"].read_text() == (sent[0] / "report.html").read_text()


def test_settings_of_other_alphabets_have_keys_of_their_own():
    rows = [
        {"x": 1.0, "y": 2.0, "series": "kda", "mixer": "kda", "setting": name} for name in ("\u65e5", "\u6708", "a")
    ]
    rows = [row | {"run": "r", "seed": "0", "configuration": "c", "front": True} for row in rows]
    chart = charts.against("front", "t", "c", rows, x="tokens/s", y="bits")
    assert [key for key, _ in _panels(chart)] == ["front/all", "front/all_1", "front/a"]


def test_runs_that_were_not_sent_are_found(tmp_path):
    waiting, done = (tmp_path / name / "wandb" / "offline-run-1" for name in ("a b", "c"))
    for directory in (waiting, done):
        directory.mkdir(parents=True)
    (done / "run-1.wandb.synced").touch()
    found = offline_runs([tmp_path / "a b", tmp_path / "c", tmp_path / "d"])
    assert found == {tmp_path / "a b": [waiting]}
    assert sync_command(found, project="mine") == f"wandb sync --project mine '{waiting}'"


@pytest.mark.slow
def test_runs_that_are_offline_are_named_with_the_command(bench, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "runs" / "kda_0", "kda", model="tiny")
    (run / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    done = write_run(tmp_path / "runs" / "kda_1", "kda", seed=1, model="tiny") / "wandb" / "offline-run-2-def"
    done.mkdir(parents=True)
    (done / "run-def.wandb.synced").touch()
    monkeypatch.setattr("lkda.commands.compare.send_report", lambda *given, **named: None)
    compare(composed("compare", f"runs={tmp_path}/runs/*", f"out={tmp_path}/out", "wandb=mine"))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"1 run was logged offline: {run}." in shown
    assert f"wandb sync --project mine {run}/wandb/offline-run-1-abc" in shown
    assert "offline-run-2-def" not in shown


@pytest.mark.parametrize("name", ["", "a/b", "x" * 129])
def test_what_is_no_name_of_a_project_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(ValueError, match="must be the name of a project"):
        compare(composed("compare", f"runs={tmp_path}/none", f"out={tmp_path}/out", f"wandb='{name}'"))
    assert not (tmp_path / "out").exists()
