"""The notes' table and claims are drawn from notes.json, whatever of it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.report.studies import notes
from lkda.report.studies.notes_claims import BASELINE, CHUNKED, FUSED, NAIVE, RECURRENT, TUNED, exponent

HEADER = {"device": "a GPU", "copy_gb_per_s": 4000.0, "product_tflops": 700.0, "torch": "2.11", "date": "2026-11-28T"}
# Milliseconds at 1K tokens, and the exponent of T.
SPEEDS = {
    BASELINE: (1.0, 1),
    TUNED: (0.25, 1),
    RECURRENT: (2.0, 1),
    CHUNKED: (0.5, 1),
    NAIVE: (4.0, 2),
    FUSED: (0.1, 2),
}


def row(part: str, name: str, T: int, D: int, ms: float) -> dict[str, Any]:
    return {
        **{"part": part, "name": name, "op": "kda", "B": 1, "T": T, "H": 16, "D": D, "noisy": False, "error": 1e-3},
        **{"ms_median": ms, "operations": 1e9 * D, "bytes": 2**20, "bound_by": "memory", "gb_per_s": 10.0},
        **{"fraction_of_lower_bound": 0.5, "registers": 36, "shared_bytes": 2048, "state_bytes": 8192, "peak_mib": 8.0},
        **{"spill_bytes": 0, "complexity": "T", "occupancy": 0.25, "occupancy_limit": 0.5},
    }


def found() -> dict[str, Any]:
    rows = [
        row("length", name, T, 64, ms * (T / 1024) ** power)
        for T in (1024, 4096, 8192, 131_072)
        for name, (ms, power) in SPEEDS.items()
    ]
    rows += [row("head size", name, 8192, D, ms * D**2) for D in (32, 64) for name, (ms, _) in SPEEDS.items()]
    rows += [row("ablation", name, T, 128, ms) for T in (64, 256) for name, ms in (("wide", 2.0), ("narrow", 3.0))]
    return {"kind": "notes", "header": HEADER, "rows": rows}


def decoding(mixer: str, context: int, speed: float) -> dict[str, Any]:
    row = {"mixer": mixer, "context": context, "tokens_per_s": speed}
    return row | {"implementation": "lkda", "model": "small", "batch": 1}


def column(cells: notes.Cells, heading: str) -> dict[str, str]:
    head, body = cells
    return {line[0]: line[head.index(heading)] for line in body}


def test_exponents_are_fitted():
    assert exponent([(1, 3.0), (2, 12.0), (4, 48.0)]) == pytest.approx(2)
    assert exponent([(1, 3.0), (2, None)]) is None
    cells = notes.tables(found(), [])
    assert set(column(cells["times"], "exponent of T").values()) == {"1.00", "2.00"}
    assert column(cells["times"], "exponent of T")[NAIVE] == "2.00"
    assert set(column(cells["heads"], "exponent of D").values()) == {"2.00"}
    assert set(column(cells["heads"], "exponent of D of the operations").values()) == {"1.00"}


def test_variants_are_compared_with_the_first():
    assert column(notes.tables(found(), [])["recurrent"], "time / first variant's") == {
        "wide": "1.00",
        "narrow": "1.50",
    }


def test_claims_quote_what_was_measured():
    rows = [decoding("kda", 1024, 9.0), decoding("softmax", 1024, 9.0)]
    rows += [decoding("kda", 2**18, 8.0), decoding("softmax", 2**18, 2.0)]
    measured = column(notes.tables(found(), rows)["claims"], "measured here")
    assert measured["time of simplified attention at 8K tokens"] == "tuned 2 ms, baseline 8 ms"
    assert measured["KDA's time divided by simplified attention's, at 8K"].startswith(
        "KDA chunked / simplified tuned = 2,"
    )
    assert measured["naive attention divided by simplified attention, at 128K"].startswith(
        "softmax naive / simplified tuned = 2,048,"
    )
    assert measured["decoding throughput divided by that of a Transformer"].endswith("kda 4 at 256K")
    why = column(notes.tables(found(), rows)["claims"], "why they differ")
    assert "The times cross near 5K" in why["short contexts"]


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    stopped = found()
    stopped["rows"] = stopped["rows"][:3]
    measured = column(notes.tables(stopped, [])["claims"], "measured here")
    assert measured["time of KDA at 8K tokens"] == "recurrent not measured, chunked not measured"
    assert measured["decoding throughput divided by that of a Transformer"] == "not measured"
    (tmp_path / "notes.json").write_text(json.dumps(stopped))
    notes.redraw(tmp_path / "notes.json")


def test_files_and_blocks(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "decode").mkdir()
    path = tmp_path / "notes" / "notes.json"
    path.write_text(json.dumps(found()))
    rows = [decoding("kda", 1024, 9.0), decoding("softmax", 1024, 3.0)]
    other = {"kind": "decode", "header": {"device": "a GPU"}, "rows": rows}
    (tmp_path / "decode" / "decode.json").write_text(json.dumps(other))
    notes.redraw(path)
    assert {file.name for file in path.parent.iterdir()} == {"notes.json", "table.md", "time_by_length.png"}
    assert "kda 3 at 1K" in notes.block("claims", path)
    (tmp_path / "decode" / "decode.json").write_text(json.dumps(other | {"header": {"device": "another GPU"}}))
    assert "kda 3 at 1K" not in notes.block("claims", path)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text(json.dumps({"kind": "notes", "header": HEADER, "rows": [{"part": "length"}]}))
    with pytest.raises(ValueError, match=r"is not of scripts/benchmark.py task=notes \(KeyError"):
        notes.redraw(tmp_path / "notes.json")
