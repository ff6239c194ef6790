"""The study of learning rates: its table, its plot, and that configs hold what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lkda.report.redraw import main
from lkda.report.studies.learning_rates import rows

ROOT = Path(__file__).parents[3]
COMMITTED = sorted((ROOT / "docs" / "results").glob("learning_rates_*/runs.json"))


def run(mixer: str, rate: float, loss: float, *, model: str = "small") -> dict[str, object]:
    return {"model": model, "mixer": mixer, "learning_rate": rate, "loss": loss}


def test_the_best_of_each_mixer_is_in_bold() -> None:
    runs = [run("kda", 2e-3, 1.0), run("kda", 1e-3, 1.5), run("kda", 1e-3, 1.7), run("softmax", 2.8e-3, 2.0)]
    assert rows([*runs, run("kda", 1e-3, 9.0, model="tiny")], {"small": "loss"}) == [
        {"model": "small", "mixer": "kda", "1e-3": "1.600", "2e-3": "**1.000**", "2.8e-3": ""},
        {"model": "small", "mixer": "softmax", "1e-3": "", "2e-3": "", "2.8e-3": "**2.000**"},
    ]


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
