"""The experiment on how a state's error grows, and what is drawn of it."""

from __future__ import annotations

import json
import sys

import pytest

from lkda.bench import state_error
from lkda.ops.kda.state import STATE_DTYPES
from lkda.report.redraw import redraw


@pytest.mark.slow
def test_a_short_one_writes_rows_of_which_table_and_plot_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["state_error", "--out", str(tmp_path), "--steps", "100"])
    state_error.main()
    rows = json.loads((tmp_path / "errors.json").read_text())["rows"]
    assert {row["state_dtype"] for row in rows} == set(STATE_DTYPES)
    assert {row["decay"] for row in rows} == set(state_error.DECAYS)
    last = {row["state_dtype"]: row["error_o"] for row in rows if row["step"] == 100 and row["decay"] == 1e-3}
    assert 0 < last["float32"] < 1e-5 < last["bfloat16"] < last["int8"] < 0.3
    assert "bfloat16" in capsys.readouterr().out
    redraw(tmp_path / "errors.json")
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["state"] for row in table["rows"]] == list(STATE_DTYPES)
    assert table["rows"][2]["0.001 nats per token"] == f"{last['int8']:.1e}"
    assert "Every token writes" in table["note"]
    assert (tmp_path / "error_growth.png").stat().st_size > 10_000
