"""Errors of gradients through the layer's op."""

from __future__ import annotations

import json
import sys

from lkda.bench import layer_gradients


def test_those_of_the_gates_parameters_are_small_in_float32(tmp_path, monkeypatch):
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["layer_gradients", "--out", str(out), "--shapes", "1x128x2x32"])
    layer_gradients.main()
    rows = {row["inputs"]: row for row in json.loads(out.read_text())["rows"]}
    assert float(rows["float32"]["dA_log"]) < 1e-3
    assert float(rows["float32"]["ddt_bias"]) < 1e-3
    assert float(rows["float32"]["dq"]) < float(rows["bfloat16"]["dq"]) < 2e-2
