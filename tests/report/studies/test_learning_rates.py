"""The study of learning rates: its table, its plot, and that configs hold what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lkda.report.redraw import main
from lkda.report.studies.learning_rates import main as collect_and_draw
from lkda.report.studies.learning_rates import rows

ROOT = Path(__file__).parents[3]
COMMITTED = sorted((ROOT / "docs" / "results").glob("learning_rates_*/runs.json"))


def run(mixer: str, rate: float, loss: float, *, model: str = "small") -> dict[str, object]:
    return {"model": model, "mixer": mixer, "learning_rate": rate, "loss": loss}


def test_the_best_of_each_mixer_is_in_bold() -> None:
    runs = [run("kda", 2e-3, 1.0), run("kda", 1e-3, 1.5), run("kda", 1e-3, 1.7), run("softmax", 2.8e-3, 2.0)]
    assert rows([*runs, run("kda", 1e-3, 9.0, model="tiny")], {"small": "loss"}) == [
        {"model": "small", "mixer": "kda", "1e-3": "1.600", "2e-3": "**1.000**", "2.8e-3": "", "optimum": "edge"},
        {"model": "small", "mixer": "softmax", "1e-3": "", "2e-3": "", "2.8e-3": "**2.000**", "optimum": "edge"},
    ]


def test_an_optimum_inside_the_grid() -> None:
    (row,) = rows([run("kda", 1e-3, 1.2), run("kda", 2e-3, 1.0), run("kda", 4e-3, 1.1)], {"small": "loss"})
    assert row["optimum"] == "inside"


def trained(path: Path, mixer: str, rate: float, bits: float, *, tokens: int = 23_600_000) -> None:
    """A run directory."""
    path.mkdir(parents=True)
    summary = {"mixer": mixer, "learning_rate": rate, "val/bits_per_byte": bits, "val/loss": 2 * bits, "tokens": tokens}
    summary |= {"status": "finished", "model": "small", "data": "prose", "context": 1024, "seed": 1, "device": "a GPU"}
    summary |= {"precision": "bf16-mixed", "clipped_share": 0.0, "state_bytes": 1, "tokens_per_s": 9.0, "params": 5}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text("model: {}\n")
    (path / "metrics.csv").write_text("step,tokens,seconds,val/loss\n1,1,1,1\n")


def test_run_directories_are_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate, bits in ((1e-3, 1.4), (2e-3, 1.3), (4e-3, 1.5)):
        trained(tmp_path / "runs" / f"kda_{rate}", "kda", rate, bits)
    trained(tmp_path / "runs" / "longer", "kda", 2e-3, 1.2, tokens=70_800_000)
    (tmp_path / "runs" / "failed").mkdir()
    collect_and_draw([f"{tmp_path}/runs/*", f"{tmp_path}/out"])
    assert "left out" in capsys.readouterr().out
    first, second = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert first == {
        **{"model": "small", "mixer": "kda", "1e-3": "1.400", "2e-3": "**1.300**", "4e-3": "1.500"},
        "optimum": "inside",
    }
    assert (second["model"], second["2e-3"]) == ("small, 70.8M tokens", "**1.200**")
    assert (tmp_path / "out" / "loss_by_rate.png").is_file()
    with pytest.raises(SystemExit, match="there are no finished runs"):
        collect_and_draw([f"{tmp_path}/none/*", f"{tmp_path}/out"])


def test_it_is_drawn(tmp_path: Path) -> None:
    found = {"kind": "learning_rates", "note": "A note.", "measures": {"small": "loss"}}
    (tmp_path / "runs.json").write_text(json.dumps({**found, "runs": [run("kda", 1e-3, 2.0), run("kda", 2e-3, 1.0)]}))
    main([str(tmp_path)])
    assert json.loads((tmp_path / "table.json").read_text())["note"] == "A note."
    assert (tmp_path / "loss_by_rate.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.json").write_text('{"kind": "learning_rates", "note": "", "measures": {}, "runs": [{}]}')
    with pytest.raises(SystemExit, match=r"runs\.json is not a file of runs at several learning rates"):
        main([str(tmp_path)])


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_configs_hold_rates_that_were_measured(path: Path) -> None:
    """The rate of a mixer is within 0.005 bits per byte of the best that was measured for it."""
    found = json.loads(path.read_text())
    for model in found["measures"]:
        best: dict[str, dict[float, float]] = {}
        for each in (each for each in found["runs"] if each["model"] == model):
            best.setdefault(each["mixer"], {})[each["learning_rate"]] = each["bits_per_byte"]
        for mixer, values in best.items():
            configured = yaml.safe_load((ROOT / "configs" / "mixer" / f"{mixer}.yaml").read_text())
            rate = (configured.get("learning_rate") or {}).get(model)
            if rate is not None:
                assert values[rate] < min(values.values()) + 0.005, (mixer, model, rate)
