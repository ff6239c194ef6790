"""Speeds and losses of other packages' models -> a table, and a plot where there are several seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.report.draw.style import LIGHT
from lkda.report.read.files import read_results_file
from lkda.report.redraw import redraw
from lkda.report.studies.foreign_models import KIND, SIZES, difference_and_spread, grouped
from tests.report.conftest import drawn

RESULTS = Path(__file__).parents[3] / "docs" / "results"
COMMITTED = sorted(RESULTS.glob("*/foreign_models.json"))
HEADER = {"device": "NVIDIA H200", "torch": "2.11", "date": "2026-11-28T00:00", "versions": {"fla-core": "0.6.0"}}


def row(name: str, seed: int = 0, speed: float = 100.0, loss: float = 2.0, **changes: Any) -> dict[str, Any]:
    sizes = {
        "layers": 12,
        "width": 1024,
        "head_dim": 128,
        "vocab_size": 32000,
        "rows": 4,
        "context": 4096,
        "steps": 100,
    }
    sizes["checkpointing"] = False
    speeds = {"tokens_per_s": speed, "prefill_tokens_per_s": 2 * speed, "first_step_s": 3.0, "peak_bytes": 2**30}
    return {"implementation": name, "seed": seed, **sizes, **speeds, "losses": [9.0] * 50 + [loss] * 50, **changes}


def table_of(rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    (folder / "foreign_models.json").write_text(json.dumps({"kind": KIND, "header": HEADER, "rows": rows}))
    redraw(folder / "foreign_models.json")
    found: dict[str, Any] = json.loads((folder / "table.json").read_text())
    return found


def test_speeds_are_beside_those_of_lkda_in_the_same_model(tmp_path: Path) -> None:
    failed = {name: row("fla")[name] for name in ("implementation", "seed", "checkpointing", *SIZES)}
    failed |= {"reason": "not done after 60 s"}
    table = table_of([row("kimi_torch"), row("kimi_lkda", speed=250.0), failed, row("fla_lkda")], tmp_path)
    assert [line["lkda / this"] for line in table["rows"]] == ["2.50", "", "", ""]
    assert [line["remark"] for line in table["rows"]] == ["", "", "not done after 60 s", ""]
    assert "12 dense layers of 1024" in table["note"]
    assert not (tmp_path / "losses.png").exists()


def test_losses_are_compared_seed_by_seed_with_the_spread_of_seeds(tmp_path: Path) -> None:
    theirs = [row("fla", seed, loss=loss) for seed, loss in ((0, 2.0), (1, 2.1))]
    ours = [row("fla_lkda", seed, loss=loss) for seed, loss in ((0, 2.01), (1, 2.11))]
    assert difference_and_spread(ours, theirs) == (pytest.approx(0.01), pytest.approx(0.1))
    table = table_of([*theirs, *ours], tmp_path)
    assert table["rows"][0]["lkda's minus this"] == "+0.0100 (between seeds: 0.1000)"
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_the_legend_names_kernels_and_the_colours_are_of_no_mixer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [row(name, seed) for name in ("fla", "fla_lkda") for seed in (0, 1)]
    (figure,) = drawn(monkeypatch, lambda: table_of(rows, tmp_path))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    assert names == ["FLA's kernels, 2 seeds", "lkda's kernels, 2 seeds"]
    lkda, other, _ = LIGHT.implementations
    assert [line.get_color() for line in figure.axes[0].lines] == [other, other, lkda, lkda]


def test_what_is_not_of_the_command_is_named(tmp_path: Path) -> None:
    for rows in ([], [{"implementation": "fla"}], [row("fla"), row("fla_lkda", context=8)]):
        with pytest.raises(ValueError, match=r"foreign_models.json is not of lkda\.bench\.foreign_models"):
            table_of(rows, tmp_path)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_committed_losses_differ_by_less_than_the_seeds(path: Path) -> None:
    groups = grouped(read_results_file(path, kind=KIND)["rows"])
    ours, theirs = (groups.get((name, False), []) for name in ("fla_lkda", "fla"))
    if min(len(ours), len(theirs)) < 3:
        pytest.skip("fewer than three seeds")
    difference, spread = difference_and_spread(ours, theirs)
    assert abs(difference) < spread
