"""Over a long run, memory and the time of a step stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.commands.long_run import measure
from lkda.report.redraw import main as redraw
from lkda.report.studies.long_run import quarters


@pytest.mark.long
def test_nothing_grows_in_20_000_steps() -> None:
    rows = measure(20_000)
    assert rows[-1]["step"] == 20_000
    for column, most in (("resident_bytes", 1.01), ("objects", 1.001), ("steps_per_fixed", 1.1)):
        second, _, last = quarters(rows, column)
        assert last <= most * second, (column, second, last)


def test_a_short_one_is_measured() -> None:
    rows = measure(8, "mixer=softmax")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["cpu_seconds_per_step"] > 0 and row["objects"] > 10_000 for row in rows)
    assert all(0.1 < row["steps_per_fixed"] < 1000 for row in rows)
    assert 2**26 < rows[-1]["resident_bytes"] < 2**36


def rows_of(growth: float) -> list[dict[str, Any]]:
    """100 rows, whose values grow by that factor over the run."""
    values = {"resident_bytes": 400 * 2**20, "objects": 200_000, "cpu_seconds_per_step": 0.004, "steps_per_fixed": 3.0}
    return [
        {"step": 10 * n, **{name: value * (1 + growth * n / 99) for name, value in values.items()}} for n in range(100)
    ]


@pytest.mark.parametrize(("growth", "shown"), [(0.0, "+0.0%"), (1.0, "+36.8%")])
def test_growth_is_shown(growth: float, shown: str, tmp_path: Path) -> None:
    header = {"steps": 1000, "threads": 1, "torch": "2.9"}
    (tmp_path / "long_run.json").write_text(json.dumps({"kind": "long_run", "header": header, "rows": rows_of(growth)}))
    redraw([str(tmp_path)])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["growth"] for row in table["rows"]] == [shown] * 4
    assert (tmp_path / "long_run.png").read_bytes().startswith(b"\x89PNG")
