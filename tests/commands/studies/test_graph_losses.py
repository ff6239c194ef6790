"""Losses with and without CUDA graphs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lkda.commands.studies import graph_losses, graph_losses_row
from lkda.commands.studies.graph_losses import compare, main
from lkda.report import readme
from tests.commands.small import small_run

PLAIN = {"losses": [5.0, 4.0, 3.0], "weights": "a", "graphs": False}
GRAPHS = {"losses": [5.0, 4.01, 2.99], "weights": "b", "graphs": True}


def test_a_row_says_how_far_losses_are_apart_and_whether_two_runs_are_one() -> None:
    row = compare("kda", deterministic=False, without_graphs=[PLAIN, PLAIN], graphs=[GRAPHS, GRAPHS])
    assert (row["largest difference"], row["mean difference"], row["at the first step"]) == (
        *("1.0e-02", "6.7e-03"),
        "0.0e+00",
    )
    assert row["CUDA graphs"] == "yes"
    assert row["two runs with graphs"] == row["two runs without"] == "equal bit for bit"
    other = {**GRAPHS, "losses": [5.0, 4.0, 3.0]}
    later = compare("kda", deterministic=False, without_graphs=[PLAIN, PLAIN], graphs=[GRAPHS, other])
    assert later["two runs with graphs"] == "apart after step 1, at most 1.0e-02, mean 6.7e-03"
    other = {**GRAPHS, "weights": "c"}
    weights = compare("kda", deterministic=False, without_graphs=[PLAIN, PLAIN], graphs=[GRAPHS, other])
    assert weights["two runs with graphs"] == "the same loss for 3 steps"


def test_each_training_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def child(module: str, request: dict[str, Any], limit: float, log: Path) -> dict[str, Any]:
        asked.append([word for word in request["overrides"] if word.startswith(("mixer", "compile", "trainer.det"))])
        return PLAIN if "compile=false" in request["overrides"] else GRAPHS

    monkeypatch.setattr(graph_losses, "run_child", child)
    main(["--mixers", "kda,kda_mla_3to1", "--steps", "3", "--out", str(tmp_path), "trainer=cpu", "data=random"])
    of_each = [[compile] for compile in ("compile=false", "compile=auto") for _ in range(2)]
    want = [[f"mixer={mixer}", *words] for mixer in ("kda", "kda_mla_3to1") for words in of_each]
    want += [["mixer=kda_mla_3to1", *words, "trainer.deterministic=true"] for words in of_each]
    assert sorted(asked) == sorted(want)
    found = json.loads((tmp_path / "table.json").read_text())
    assert [(row["mixer"], row["trainer.deterministic"]) for row in found["rows"]] == [
        *(("kda", "false"), ("kda_mla_3to1", "false")),
        ("kda_mla_3to1", "true"),
    ]
    assert found["losses"]["kda"]["compile=auto"] == GRAPHS["losses"]
    assert "| kda_mla_3to1 | true | yes |" in readme._table(tmp_path / "table.json")


def test_a_failed_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(graph_losses, "run_child", lambda *given: {"reason": "out of memory"})
    with pytest.raises(SystemExit) as ended:
        main(["--mixers", "kda", "--out", str(tmp_path), "trainer=cpu", "data=random"])
    assert ended.value.code == 1
    with pytest.raises(SystemExit) as ended:
        main(["--mixers", "kada", "--out", str(tmp_path)])
    assert ended.value.code == 2
    out, first = capsys.readouterr().err.splitlines(), "error: out of memory"
    assert out[0] == first
    assert out[1].startswith("error: --mixers: there is no kada")
    assert not (tmp_path / "table.json").exists()


@pytest.mark.slow
def test_one_training_gives_its_losses_and_weights(corpus: Path) -> None:
    words = small_run(corpus, "trainer.max_steps=2", "trainer.val_check_interval=2", "checkpoint.every_n_steps=2")
    first, second = (graph_losses_row.measure({"overrides": words}) for _ in range(2))
    assert len(first["losses"]) == 2
    assert not first["graphs"]
    assert first == second


@pytest.mark.parametrize(
    "override", ["mixer=mla", "trainer.log_every_n_steps=5", "trainer.max_steps=9", "compile=true"]
)
def test_what_each_training_has_already_is_refused(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--mixers", "kda", "--out", str(tmp_path), "trainer=cpu", override])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: overrides must not set {override.partition('=')[0]}, got")
