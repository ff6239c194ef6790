"""The benchmark of the forward in one kernel."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lkda.bench import one_pass
from lkda.bench.op_benchmark import Shape
from lkda.bench.timing import Timing
from lkda.checks import InputError
from lkda.ops.kda.cuda import core


def test_a_machine_without_a_gpu_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["one_pass", "--out", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit, match="error: one_pass measures on a GPU, and torch sees no CUDA device"):
        one_pass.main()


class TestRow:
    """On a CPU, where the two "kernels" are functions of the test."""

    shape = Shape(1, 8, 2, 4)

    @pytest.fixture(autouse=True)
    def emulated(self, monkeypatch):
        monkeypatch.setattr(one_pass, "plan_of", lambda v, bounds: SimpleNamespace(chunk_fwd=1))
        monkeypatch.setattr(one_pass, "graph_of", lambda call: call)
        monkeypatch.setattr(one_pass, "steady_clock", lambda *a, **o: Timing(1.0 + (not core.ONE_PASS), 1.0, 1.0))

    def row(self):
        return one_pass.row(self.shape, "slow", "bf16", torch.device("cpu"), 1.0)

    def test_each_call_gets_its_kernel(self, monkeypatch):
        state = torch.ones(2)
        monkeypatch.setattr(
            one_pass, "kda_attention", lambda q, k, v, *a, **o: (v.cumsum(1), state * (1 + 1e-3 * core.ONE_PASS))
        )
        found = self.row()
        assert [found[name] for name in ("two kernels", "one kernel", "two kernels, again")] == [
            "2.0000",
            "1.0000",
            "2.0000",
        ]
        assert (found["one / two"], found["difference of o"], found["of the final state"]) == (
            "0.50",
            "0.0e+00",
            "1.0e-03",
        )
        assert not found["wrong"]
        assert core.ONE_PASS is True

    def test_what_is_wrong_is_named(self, monkeypatch):
        calls = iter(range(100))
        monkeypatch.setattr(
            one_pass,
            "kda_attention",
            lambda q, k, v, *a, **o: (v.flip(1) + next(calls), torch.ones(2) / (1 - core.ONE_PASS)),
        )
        assert self.row()["wrong"] == "differs by inf, not deterministic, not causal"

    @pytest.mark.parametrize("error", [0.0, 1e-7])
    def test_with_a_backward_all_bits_must_be_equal(self, monkeypatch, error):
        monkeypatch.setattr(one_pass, "plan_of", lambda v, bounds: SimpleNamespace(chunk_fwd_saves=1))

        def attention(q, k, v, g, beta, backend):
            o = sum(x.cumsum(1) for x in (q, k, v, g)) * beta[..., None]
            return o * (1 + error * core.PAIR_SAVES), torch.ones(2)

        monkeypatch.setattr(one_pass, "kda_attention", attention)
        before = core.PAIR_SAVES
        found = one_pass.row(self.shape, "slow", "bf16", torch.device("cpu"), 1.0, backward=True)
        assert (found["wrong"] == "") is (found["of the gradients"] == "0.0e+00") is (error == 0)
        assert found["wrong"].startswith("differs by" if error else "")
        assert core.PAIR_SAVES is before

    def test_a_shape_of_the_two_kernels_is_refused(self, monkeypatch):
        monkeypatch.setattr(one_pass, "plan_of", lambda v, bounds: SimpleNamespace(chunk_fwd=None))
        with pytest.raises(InputError, match="1 8 2 4: two kernels compute this shape"):
            self.row()


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
def test_on_a_gpu(monkeypatch, tmp_path):
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["one_pass", "--out", str(out), "--shapes", "2x200x64x64", "--milliseconds", "10"])
    assert one_pass.main() == 0
    assert [row["gates"] for row in json.loads(out.read_text())["rows"]] == ["slow", "fast"]
