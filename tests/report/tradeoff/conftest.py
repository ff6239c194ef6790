"""Results of scripts/benchmark.py with made-up speeds, whose crossings are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import bench_row

DEVICE = "a GPU"


def write_results(path: Path, kind: str, rows: list[dict[str, Any]], **header: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kind": kind, "header": {"device": DEVICE, **header}, "rows": rows}))
    return path


def decode_row(mixer: str, context: int, tokens_per_s: float | None, **changes: Any) -> dict[str, Any]:
    row = {"title": mixer, "implementation": "lkda", "model": "tiny", "mixer": mixer, "dtype": "bf16"}
    row |= {"state_dtype": None, "batch": 1, "context": context, "top_p": None, "vocab_size": 300, "overrides": []}
    measured = {} if tokens_per_s is None else {"tokens_per_s": tokens_per_s, "bytes_per_sequence": 1000 + context}
    return row | measured | changes


def step_row(mixer: str, B: int, T: int, tokens_per_s: float, **changes: Any) -> dict[str, Any]:
    row = {"title": mixer, "implementation": "train", "model": "tiny", "mixer": mixer, "B": B, "T": T, "packed": False}
    row |= {"vocab_size": 300, "compile": "auto", "overrides": [], "steps": 10, "reserved_gib": 1.0}
    return row | {"tokens_per_s": tokens_per_s} | changes


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all three kinds: softmax decodes at 8e6 / context tokens/s and KDA at 1000, so they cross at
    8000; in kernels and steps one is always the faster one."""
    home = tmp_path_factory.mktemp("bench")
    decode = [decode_row("softmax", T, 8e6 / T) for T in (2000, 4000, 16_000)]
    decode += [decode_row("kda", T, 1000.0) for T in (2000, 4000, 16_000)]
    decode += [decode_row("kda", 2000, None, implementation="fla", title="kda, FLA", reason="fla is not installed")]
    write_results(home / "decode" / "decode.json", "decode", decode)
    steps = [
        step_row(mixer, 8192 // T, T, speed)
        for mixer, speed in (("kda", 100.0), ("softmax", 50.0))
        for T in (1024, 4096)
    ]
    write_results(home / "steps" / "step_benchmark.json", "step_benchmark", steps)
    rows = [
        bench_row(op, B=8192 // T, T=T, ms=ms, gate=None)
        for op, ms in (("kda", 2.0), ("simplified", 1.0))
        for T in (1024, 2048)
    ]
    write_results(home / "operators" / "benchmark.json", "benchmark", rows)
    (home / "table.json").write_text('{"kind": "table", "rows": [], "note": ""}')
    return home
