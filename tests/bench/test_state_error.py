"""The experiment on how a state's error grows."""

from __future__ import annotations

import sys

from lkda.bench import state_error


def test_a_short_one_writes_rows_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["state_error", "--out", str(tmp_path), "--steps", "100"])
    state_error.main()
    rows = state_error.json.loads((tmp_path / "errors.json").read_text())["rows"]
    assert {row["kept"] for row in rows} == set(state_error.KEPT)
    assert {row["decay"] for row in rows} == set(state_error.DECAYS)
    last = {row["kept"]: row["error_o"] for row in rows if row["step"] == 100 and row["decay"] == 1e-3}
    assert 0 < last["float32"] < 1e-5 < last["bfloat16"] < last["int8"] < 0.3
    assert (tmp_path / "errors.svg").stat().st_size > 0
    assert "bfloat16, to nearest" in capsys.readouterr().out
