"""The times of single kernels: their sums, on a GPU the kernels that run, and what a machine without one is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lkda.bench import kernel_times
from lkda.bench.kernel_times import KERNELS, by_kernel


def test_launches_are_summed_by_kernel() -> None:
    events = [("kda_inter_chunk_fwd", 2000.0), ("kda_inter_chunk_fwd", 1000.0), ("kda_amax", 500.0), ("copy", 250.0)]
    assert by_kernel(events, calls=2) == {"inter_chunk_fwd": 1.5, "amax": 0.25, "others": 0.125}
    events = [("kda_chunk_fwd", 10.0), ("kda_chunk_fwd_pair", 30.0), ("kda_intra_chunk_fwd", 20.0)]
    events.append(("kda_chunk_fwd_pair_saves", 10.0))
    assert by_kernel(events, calls=1) == {
        "chunk_fwd": 0.01,
        "chunk_fwd_pair": 0.04,
        "intra_chunk_fwd": 0.02,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kernel_times", "--out", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit, match=r"^error: kernel_times measures on a GPU, and torch sees no CUDA device\.$"):
        kernel_times.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_runs_the_kernels_of_the_columns(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    words = [sys.executable, "-m", kernel_times.__name__, "--out", str(out), "--shapes", "1x4096x2x64"]
    subprocess.run([*words, "--milliseconds", "5"], check=True)
    slow, fast = json.loads(out.read_text())["rows"]
    assert {slow["gates"], fast["gates"]} == {"slow", "fast"}
    assert all(re.fullmatch(r"\d+\.\d{3}", slow[name]) for name in KERNELS)
