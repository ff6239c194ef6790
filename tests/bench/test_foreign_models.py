"""The measurement of other packages' models, at a tiny size on a CPU."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from lkda.bench import foreign_models
from lkda.bench.foreign_models import Chain, Sizes, measure
from lkda.device import device_name

TINY = Sizes(layers=2, width=32, head_dim=16, vocab_size=20, rows=2, context=16)
CPU = torch.device("cpu")


def test_a_model_of_transformers_with_lkdas_kernels_is_measured():
    pytest.importorskip("transformers", minversion="5.24")
    row = measure("kimi_lkda", TINY, CPU, steps=12, seed=0)
    assert row["tokens_per_s"] == pytest.approx(32 / row["step_ms"] * 1000)
    assert row["prefill_tokens_per_s"] > 0
    assert len(row["losses"]) == 12
    assert row["losses"][-1] < row["losses"][0]


def test_the_chain_can_be_learned_and_differs_by_seed():
    one, two, other = (Chain(TINY, CPU, seed).batch() for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    table = Chain(TINY, CPU, 0).table
    for tokens in (one, other):
        assert (table[tokens[:, :-1]] == tokens[:, 1:, None]).any(-1).all()


def test_too_few_steps_are_said():
    with pytest.raises(ValueError, match="steps must be above 10, which are not timed, got 10"):
        measure("kimi_lkda", TINY, CPU, steps=10, seed=0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(foreign_models.sys.modules, "fla.ops.kda", None)
    with pytest.raises(ValueError, match="needs flash-linear-attention"):
        measure("fla", TINY, CPU, steps=11, seed=0)


class TestCommand:
    @pytest.fixture
    def call(self, tmp_path, monkeypatch):
        """Calls the command, and returns the rows of its file. Rows are stood in for; `reasons` has those that fail."""
        asked, reasons = [], {}

        def row(case, seconds, arguments):
            asked.append((case["implementation"], case["seed"]))
            reason = reasons.get(case["implementation"])
            speeds = {"tokens_per_s": 1.0, "prefill_tokens_per_s": 1.0, "first_step_s": 1.0, "losses": [2.0, 1.0]}
            return case | ({"reason": reason} if reason else speeds)

        def call(*words):
            asked.clear()
            monkeypatch.setattr(foreign_models.sys, "argv", ["", "--device", "cpu", "--out", str(tmp_path), *words])
            foreign_models.main()
            found = json.loads((tmp_path / foreign_models.FILE).read_text())
            assert found["kind"] == "foreign_models"
            return found["rows"]

        monkeypatch.setattr(foreign_models, "_row_of_process", row)
        call.asked, call.reasons = asked, reasons
        return call

    @pytest.mark.slow
    def test_a_later_call_measures_only_what_is_missing(self, call, capsys):
        call.reasons["fla"] = "no"
        assert [row["implementation"] for row in call("--only", "kimi_lkda,fla")] == ["kimi_lkda", "fla"]
        assert capsys.readouterr().out.endswith("loss 2.000 -> 1.000\nfla: no\n")
        call.reasons.clear()
        rows = call("--only", "kimi_lkda,fla", "--seeds", "0,1")
        assert call.asked == [("kimi_lkda", 1), ("fla", 0), ("fla", 1)]
        assert len(rows) == 4
        assert not any("reason" in row for row in rows)
        call("--only", "kimi_lkda", "--context", "8")
        assert call.asked == [("kimi_lkda", 0)]

    def test_rows_of_another_machine_are_kept(self, call, tmp_path):
        call("--only", "kimi_lkda")
        path = tmp_path / foreign_models.FILE
        before = path.read_text().replace(f'"device": "{device_name(CPU)}"', '"device": "another"')
        path.write_text(before)
        with pytest.raises(SystemExit, match=r"was measured on {'device': 'another', .*; choose another --out"):
            call("--only", "kimi_lkda")
        assert path.read_text() == before

    @pytest.mark.parametrize("words", [("--steps", "10"), ("--seeds", "0,x"), ("--only", "llama")])
    def test_what_cannot_be_measured_is_refused_first(self, words, call, capsys):
        with pytest.raises(SystemExit):
            call(*words)
        assert call.asked == []
        assert words[0] in capsys.readouterr().err


def test_a_row_that_takes_too_long_says_so(monkeypatch):
    def never(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(foreign_models.subprocess, "run", never)
    case = {"implementation": "fla", "seed": 0}
    assert foreign_models._row_of_process(case, 5.0, []) == case | {"reason": "not done after 5 s"}
