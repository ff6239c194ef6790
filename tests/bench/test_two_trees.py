"""KDA's times in two trees of the repository. Most processes are replaced: a new one takes seconds to import torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lkda.bench import tree_times, two_trees

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs" / "results" / "kda_before_after_h200" / "table.json"


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """Replaces the program that measures a tree by the given source text."""

    def replace(text: str) -> None:
        monkeypatch.setattr(two_trees, "WORKER", tmp_path / "worker.py")
        two_trees.WORKER.write_text(text)

    return replace


def call(monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["two_trees", *map(str, words)])
    return two_trees.main()


def record(milliseconds: float, kept: int | None = 64 * 2 * 100) -> str:
    times = {
        f"{mode} {replay}": [milliseconds, 0.0, 9.0] for mode in ("fwd", "fwd+bwd") for replay in ("eager", "replayed")
    }
    return json.dumps({"shape": "1x64x2x16", "gate": "slow", "mean_g": -0.2, "kept_bytes": kept, **times})


def test_the_worker_measures_on_a_cpu(capsys):
    tree_times.main("chunk", "1", "1x64x2x16")
    environment, slow, fast = map(json.loads, capsys.readouterr().out.splitlines())
    assert Path(environment["lkda"]).is_relative_to(ROOT)
    assert [slow["gate"], fast["gate"]] == ["slow", "fast"]
    assert fast["mean_g"] < -2 < slow["mean_g"] < 0
    for row in (slow, fast):
        assert row["kept_bytes"] is None
        assert {key for key in row if key.startswith("fwd")} == {"fwd eager", "fwd+bwd eager"}
        median, p20, p80 = row["fwd+bwd eager"]
        assert 0 < p20 <= median <= p80


def test_the_inputs_and_the_clock_need_no_lkda():
    """A tree that is measured may lack what they would import."""
    program = f"""
import runpy, sys, torch
sys.modules["lkda"] = None
for name in ("timing", "kda_inputs"):
    runpy.run_path("{ROOT}/lkda/bench/" + name + ".py")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_cell_is_the_mean_before_and_now(monkeypatch, tmp_path, worker):
    """The processes run in turns: before takes 1 and 3 ms, now 2 and 5 ms."""
    times = tmp_path / "times"
    times.write_text("1 2 3 5")
    head = json.dumps({"lkda": str(ROOT / "lkda" / "__init__.py"), "device": "H200", "torch": "2"})
    worker(f"""
from pathlib import Path
first, *rest = Path({str(times)!r}).read_text().split()
Path({str(times)!r}).write_text(" ".join(rest))
print({head!r})
print("a kernel was compiled")
print({record(123.0)!r}.replace("123.0", first))
""")
    out = tmp_path / "new" / "table.json"
    assert call(monkeypatch, ROOT, ROOT, "--backend", "chunk", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["rows"] == [
        {"B T H D": "1 64 2 16", "gates": "slow"}
        | dict.fromkeys(two_trees.COLUMNS, "2.000 -> 3.500")
        | {"kept, bytes per token and head": "100 -> 100"}
    ]
    assert [run["rows"][0]["fwd eager"][0] for run in found["runs"]["now"]] == [2, 5]
    assert found["note"].startswith("H200, torch 2, bf16 with gates in float32; before -> now; ms")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise SystemExit(3)", "ended with 3; it wrote why above"),
        (
            """print('{"lkda": "/elsewhere/lkda/__init__.py", "device": "", "torch": ""}')""",
            "imports another lkda, /else",
        ),
    ],
)
def test_a_process_that_measures_nothing_is_an_error(monkeypatch, tmp_path, worker, text, reason):
    worker(text)
    with pytest.raises(SystemExit, match=f"error: the process that measures .* {reason}"):
        call(monkeypatch, ROOT, ROOT, "--backend", "chunk", "--out", tmp_path / "table.json")
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["EMPTY", ROOT], "has no package lkda: give the root of a checkout"),
        ([ROOT, ROOT, "--shapes", "8x2048"], "a shape is B x T x H x D"),
        ([ROOT, ROOT, "--rounds", "0"], "--rounds must be a whole number of 1 or more"),
        ([ROOT, ROOT, "--out", "EMPTY"], "--out=.* is a directory"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(monkeypatch, tmp_path, worker, words, reason):
    worker("raise SystemExit('it ran')")
    given = [tmp_path if word == "EMPTY" else word for word in words]
    with pytest.raises(SystemExit, match=f"error: .*{reason}"):
        call(monkeypatch, "--backend", "chunk", "--out", tmp_path / "table.json", *given)


def test_a_machine_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: torch sees no CUDA device"):
        call(monkeypatch, ROOT, ROOT, "--out", tmp_path / "table.json")


@pytest.mark.slow
def test_two_trees_are_measured(monkeypatch, tmp_path):
    out = tmp_path / "table.json"
    words = ["--backend", "chunk", "--shapes", "1x64x2x16", "--rounds", "1", "--milliseconds", "1"]
    assert call(monkeypatch, ROOT, ROOT, *words, "--out", out) == 0
    found = json.loads(out.read_text())
    assert [row["gates"] for row in found["rows"]] == ["slow", "fast"]
    assert all(" -> " in row["eager: forward + backward"] and row["forward"] == "" for row in found["rows"])


def test_the_published_table_is_that_of_its_measurements():
    found = json.loads(PUBLISHED.read_text())
    assert found["rows"] == two_trees.table(found["runs"])
    assert {row["B T H D"].replace(" ", "x") for row in found["rows"]} == set(two_trees.SHAPES)
