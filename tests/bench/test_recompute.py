"""The benchmark of `recompute`."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lkda.bench import recompute


def test_a_machine_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["recompute", "--out", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit, match="error: torch sees no CUDA device"):
        recompute.main()


def test_a_shape_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["recompute", "--out", str(tmp_path / "table.json"), "--shapes", "8x2048"])
    with pytest.raises(SystemExit, match=r"error: --shapes: a shape is B x T x H x D, .* got 8x2048"):
        recompute.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: it measures times and memory of one")
def test_the_workspaces_are_not_kept(monkeypatch, tmp_path):
    out = tmp_path / "table.json"
    words = ["recompute", "--out", str(out), "--shapes", "2x4096x16x64", "--milliseconds", "10"]
    monkeypatch.setattr(sys, "argv", words)
    assert recompute.main() == 0
    without, with_it = json.loads(out.read_text())["rows"]
    kept = "kept, bytes per token and head"
    assert 520 <= round(without[kept] - with_it[kept], 1) < 521
    assert with_it["same bits"] is True
