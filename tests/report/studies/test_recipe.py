"""The study of the recipe: which settings a run changes, and the table of all changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lkda.report.redraw import main as redraw
from lkda.report.studies.recipe import main, rows

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMMITTED = sorted(RESULTS.glob("recipe_*/runs.json"))


def run(overrides: str, bits: float = 2.0, clipped: float = 0.0) -> dict[str, Any]:
    mixer = overrides.split()[0].removeprefix("mixer=")
    return {"mixer": mixer, "overrides": overrides, "bits_per_byte": bits, "clipped_share": clipped}


def test_a_row_for_each_change_and_a_column_for_each_mixer() -> None:
    runs = [run("mixer=kda", 1.5), run("mixer=softmax", 1.6, 0.031), run("mixer=kda model.embed_norm=false", 1.7)]
    assert rows(runs) == [
        {"changed": "nothing", "kda": "1.500 (0.0%)", "softmax": "1.600 (3.1%)"},
        {"changed": "`embed_norm=false`", "kda": "1.700 (0.0%)", "softmax": ""},
    ]


def test_settings_of_the_base_are_not_named() -> None:
    runs = [run("mixer=kda optimizer.lr=2e-3 model.embed_norm=false"), run("mixer=kda optimizer.lr=4e-3")]
    found = rows(runs, base=["optimizer.lr=2e-3", "model.embed_norm=false"])
    assert [row["changed"] for row in found] == ["nothing", "`lr=4e-3`"]


def trained(path: Path, bits: float, *, mixer: str = "kda", **changed: Any) -> None:
    """A run directory. A changed setting is named by its group and its name, as optimizer__lr."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {
        "seed": 1,
        "model": {"embed_norm": True},
        "mixer": {"name": mixer, mixer: {"conv_std": 0.02}},
        "data": {"batch_size": 4, "seed": 1},
        "optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
        "trainer": {"max_steps": 400},
        "logger": {"wandb": None},
    }
    for name, value in changed.items():
        *groups, key = name.split("__")
        section = config
        for group in groups:
            section = section[group]
        section[key] = value
    summary = {"mixer": mixer, "val/bits_per_byte": bits, "val/loss": 2 * bits, "tokens": 409600, "status": "finished"}
    summary |= {"model": "tiny", "data": "sotu", "context": 256, "device": "cpu", "precision": "32-true", "params": 5}
    summary |= {"clipped_share": 0.01, "seed": config["seed"], "state_bytes": 1, "tokens_per_s": 9.0}
    (path / "summary.json").write_text(json.dumps(summary | {"versions": {"torch": "2.11.0"}}))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.csv").write_text("step,tokens,seconds,val/loss\n1,1,1,1\n")


def test_run_directories_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    trained(runs / "z", 2.1)
    trained(runs / "a", 2.2, model__embed_norm=False)
    trained(runs / "b", 2.3, optimizer__name="muon", optimizer__momentum=0.95)
    trained(runs / "c", 2.4, optimizer__betas=[0.9, 0.99])
    trained(runs / "d", 2.5, data__batch_size=2, trainer__max_steps=800)
    trained(runs / "e", 2.6, seed=2, data__seed=2)
    trained(runs / "f", 2.7, mixer="simplified", mixer__simplified__conv_std=None)
    trained(runs / "g", 2.8, mixer="simplified", mixer__simplified__conv_std=None, model__embed_norm=False)
    (runs / "failed").mkdir()
    main([f"{runs}/*", f"{tmp_path}/out"])
    assert "left out" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [(row["changed"], row["kda"][:5], row["simplified"][:5]) for row in found["rows"]] == [
        ("nothing", "2.100", "2.700"),
        ("`seed=2`", "2.600", ""),
        ("`batch_size=2` `max_steps=800`", "2.500", ""),
        ("`embed_norm=false`", "2.200", "2.800"),
        ("`betas=[0.9,0.99]`", "2.400", ""),
        ("`optimizer=muon`", "2.300", ""),
    ]
    assert "data=sotu at 256 tokens, 0.41M tokens" in found["note"]


def test_what_is_not_a_set_of_changes(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there are no finished runs"):
        main([f"{tmp_path}/none/*", f"{tmp_path}/out"])
    trained(tmp_path / "runs" / "a", 2.0)
    trained(tmp_path / "runs" / "b", 2.1)
    with pytest.raises(SystemExit, match="a and b have the same settings: give one of them"):
        main([f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    summary = tmp_path / "runs" / "b" / "summary.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "clipped_share": None}))
    with pytest.raises(SystemExit, match=r"b: summary.json lacks clipped_share"):
        main([f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_table_is_drawn_from_its_runs(path: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text(path.read_text())
    redraw([str(tmp_path)])
    assert (tmp_path / "table.json").read_text() == (path.parent / "table.json").read_text()
