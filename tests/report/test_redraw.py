"""Results are drawn again by the kind that stands in their files, not by what the files are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lkda.report.redraw import KINDS, main, redraw, source

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_every_results_file_says_what_it_is() -> None:
    found = {path: json.loads(path.read_text())["kind"] for path in RESULTS.rglob("*.json")}
    assert set(found.values()) <= set(KINDS)
    for directory in {path.parent for path in found} - {RESULTS}:
        source(directory)  # no two would be drawn over each other


@pytest.mark.parametrize(
    ("study", "plots"),
    [
        ("state_dtypes_h100", set()),
        ("long_context_h200", {"loss_by_position.png", "bits_by_context.png", "needle_by_distance.png"}),
    ],
)
def test_studies_that_gather_evaluations_keep_their_own_tables(study: str, plots: set[str], tmp_path: Path) -> None:
    """Both write evaluations.json, and neither's table is of the other's kind."""
    shutil.copy(RESULTS / study / "evaluations.json", tmp_path / "renamed.json")
    main([str(tmp_path)])
    committed = RESULTS / study
    assert {path.name for path in tmp_path.iterdir()} == {"renamed.json", "table.json"} | plots
    assert (tmp_path / "table.json").read_text() == (committed / "table.json").read_text()


def test_what_holds_no_results_cannot_be_redrawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        source(tmp_path)
    (tmp_path / "table.json").write_text('{"kind": "table", "rows": [], "note": ""}')
    assert source(tmp_path) is None
    redraw(tmp_path / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"rows": []}', "results.json does not say what it is"),
        ('{"kind": "dream"}', "results.json is of the kind dream, which is unknown; there are comparison, benchmark"),
        (
            '{"kind": "comparison", "rows": []}',
            r"results.json is not what its kind, comparison, says \(KeyError: 'runs'\)",
        ),
        ('{"kind": "long_context"}', "results.json is not what its kind, long_context, says"),
        ("[", "results.json cannot be read as JSON"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SystemExit, match=reason):
        main([str(tmp_path)])


def test_nothing_is_drawn_where_one_directory_is_amiss(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(RESULTS / "kda_state_dtypes", tmp_path / name)
    (tmp_path / "a" / "table.json").unlink()
    shutil.copy(tmp_path / "b" / "errors.json", tmp_path / "b" / "more.json")
    with pytest.raises(SystemExit, match=r"holds errors.json and more.json, whose plots would overwrite each other"):
        main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert not (tmp_path / "a" / "table.json").exists()
