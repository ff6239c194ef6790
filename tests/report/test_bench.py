"""A benchmark's JSON -> table and plots."""

from __future__ import annotations

import io
import json

import matplotlib.image
import pytest

from lkda.report import bench


def row(backend="cuda", peer=None, mode="fwd", replay="eager", ms=0.2, T=2048, **more):
    return {
        "op": "kda", "backend": backend, "peer": peer, "B": 16384 // T, "T": T, "H": 16, "D": 64, "dtype": "bf16",
        "gate": "slow", "mode": mode, "replay": replay, "ms_median": ms, "ms_p20": ms and ms * 0.98,
        "ms_p80": ms and ms * 1.02, "floor_ms": 0.056, "gb_per_s": 900.0, "error": 4e-3, "peak_mib": 200.0,
        "reason": None,
    } | more  # fmt: skip


ROWS = [
    row(),
    row(replay="graph", ms=0.15),
    row(backend="chunk", ms=12.0),
    row(peer="fla chunk_kda", ms=1.1),
    row(peer="cudnn", ms=None, ms_p20=None, ms_p80=None, reason="cudnn frontend takes heads of 128 only"),
    row(mode="fwd+bwd", ms=0.6),
]


def test_the_table_joins_replay_to_eager_and_keeps_what_was_not_measured():
    head, body = bench.lines(ROWS)
    assert len(body) == 5
    first = dict(zip(head, body[0]))
    assert (first["ms"], first["graph ms"], first["x floor"]) == ("0.200", "0.150", "3.57")
    assert "heads of 128 only" in body[3][head.index("ms")]
    assert bench.as_markdown(ROWS).count("\n") == 7


@pytest.mark.parametrize("draw", [bench.time_bars, bench.cost_by_length])
def test_plots_show_something(draw):
    rows = [*ROWS, *(row(T=2**n, ms=0.2 + 0.01 * n) for n in range(10, 15))]
    pixels = matplotlib.image.imread(io.BytesIO(draw(rows, mode="fwd")))
    assert pixels[..., :3].std() > 0.02


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"x.json is not a benchmark's JSON \('header'\)"):
        bench.read_benchmark(path)
