"""The measurement of other packages' models, at a tiny size on a CPU."""

from __future__ import annotations

import pytest
import torch

from lkda.bench import foreign_models
from lkda.bench.foreign_models import Chain, Sizes, measure

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


def test_a_missing_package_is_the_reason_of_its_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(foreign_models.sys.modules, "fla.ops.kda", None)
    with pytest.raises(ValueError, match="needs flash-linear-attention"):
        measure("fla", TINY, CPU, steps=11, seed=0)
    monkeypatch.setattr(
        foreign_models, "_row_of_process", lambda name, seed, _: {"implementation": name, "reason": "no"}
    )
    monkeypatch.setattr(
        foreign_models.sys, "argv", ["", "--device", "cpu", "--only", "fla,kimi_fla", "--out", str(tmp_path)]
    )
    foreign_models.main()
    assert capsys.readouterr().out == "fla: no\nkimi_fla: no\n"
    assert (tmp_path / "table.json").exists()
