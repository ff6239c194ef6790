"""KDA in C++ on a CPU, against the recurrence: every gate, length and layout, forward and backward."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import kda_attention, resolve_backend
from lkda.ops.kda.cpu import core
from lkda.ops.runtime import cpp
from tests.ops.cases import GATES, kda_inputs, poisoned, relative
from tests.ops.rounded_reference import kda_truth, outputs_and_gradients

NAMES = ("q", "k", "v", "g", "beta")
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


def run(inputs, **options):
    with poisoned():
        return outputs_and_gradients(kda_attention, inputs, backend="cpu", **options)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("T", "K", "V"), [(1, 16, 16), (31, 16, 32), (32, 20, 12), (33, 16, 16), (100, 16, 80)])
def test_equals_the_recurrence_in_float64(T, K, V, gate):
    inputs = kda_inputs(2, T, 2, K, V, gate=gate)
    got, want = run(inputs), kda_truth(inputs)
    assert {name: relative(got[name], x) < 1e-12 for name, x in want.items()} == dict.fromkeys(want, True)


@pytest.mark.parametrize("K", [32, 64, 128])
def test_float32_errs_no_more_than_the_chunked_form(K):
    inputs = kda_inputs(1, 500, 1, K, K, gate="resets", dtype=torch.float32)
    truth = kda_truth(inputs, backend="chunk")
    chunked = outputs_and_gradients(kda_attention, inputs, backend="chunk")
    for name, got in run(inputs).items():
        assert relative(got, truth[name]) < 2 * relative(chunked[name], truth[name]) + 1e-7, name


def test_bfloat16_inputs_err_by_the_rounding_of_what_is_stored():
    inputs = kda_inputs(1, 130, 2, 32, 32, gate="mixed", dtype=torch.bfloat16)
    got = run(inputs)
    assert got["o"].dtype == torch.bfloat16
    assert got["final_state"].dtype == torch.float32
    for name, want in kda_truth(inputs).items():
        assert relative(got[name], want) < 3e-3, name


@pytest.mark.parametrize("bounds", [[0, 0, 70, 71, 71, 150, 150], [0, 32, 64, 150], [0, 3, 3, 140, 150]])
def test_packed_sequences_equal_the_recurrence(bounds):
    inputs = kda_inputs(1, 150, 2, 16, 16, gate="mixed")
    states = torch.randn(len(bounds) - 1, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inputs["initial_state"] = states
    packed = torch.tensor(bounds, dtype=torch.int32)
    got = run(inputs, cu_seqlens=packed)
    for name, want in kda_truth(inputs, cu_seqlens=packed).items():
        assert relative(got[name], want) < 1e-12, name


def test_the_number_of_threads_changes_no_bit():
    inputs = kda_inputs(2, 70, 3, 32, 96, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(threads)
    assert {name: torch.equal(x, results[1][name]) for name, x in results[0].items()} == dict.fromkeys(results[0], True)


def test_future_tokens_never_change_past_outputs_bitwise():
    one, two = (kda_inputs(1, 100, 2, 32, 32, dtype=torch.float32, seed=seed) for seed in (0, 1))
    for t in (1, 32, 61):
        mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in NAMES}
        o, _ = kda_attention(*(one[n] for n in NAMES), backend="cpu")
        changed, _ = kda_attention(**mixed, backend="cpu")
        assert torch.equal(o[:, :t], changed[:, :t])


def test_minus_infinity_forgets_everything_and_has_no_gradient():
    inputs = kda_inputs(1, 50, 1, 16, 16)
    inputs["g"][:, 20] = -torch.inf
    got = run(inputs)
    fresh, state = kda_attention(*(inputs[n][:, 20:] for n in NAMES), backend="recurrent")
    assert relative(got["o"][:, 20:], fresh) < 1e-12
    assert relative(got["final_state"], state) < 1e-12
    assert not got["dg"][:, 20].any()


def test_inputs_may_be_strided_and_one_output_may_be_unused():
    inputs = kda_inputs(2, 40, 2, 32, 32, dtype=torch.float32)
    inputs.pop("initial_state")
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for name, x in inputs.items()}
    plain = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    for output in (0, 1):
        got, want = (
            torch.autograd.grad(kda_attention(**x, backend=word)[output].sum(), [x[n] for n in ("k", "v", "g", "beta")])
            for x, word in ((strided, "cpu"), (plain, "chunk"))
        )
        assert all(relative(mine, theirs) < 1e-5 for mine, theirs in zip(got, want, strict=True))


def test_without_gradients_nothing_is_saved(monkeypatch):
    inputs = kda_inputs(1, 64, 1, 16, 16, dtype=torch.float32)
    want = run(inputs)["o"]
    saved = []
    results = core._results
    monkeypatch.setattr(core, "_results", lambda *a: saved.append(results(*a)[2].numel()) or results(*a))
    assert torch.equal(kda_attention(**inputs, backend="cpu")[0], want)
    assert saved == [0]


def test_the_custom_ops_are_what_pytorch_expects():
    inputs = kda_inputs(1, 40, 1, 16, 16, dtype=torch.float32)
    tensors = [x.requires_grad_() for x in inputs.values()]
    bounds = torch.tensor([0, 40], dtype=torch.int32)
    torch.library.opcheck(torch.ops.lkda.kda_cpu_forward.default, (*tensors, bounds, 0.25, True))


def test_auto_takes_it_on_a_cpu_and_the_chunked_form_where_it_cannot_be_compiled(monkeypatch):
    words = {"device": CPU, "head_dim": 64, "dtype": torch.float32}
    assert resolve_backend("kda", "auto", **words) == "cpu"
    monkeypatch.setattr(core.LIBRARY, "_loaded", None)
    monkeypatch.setattr(core.LIBRARY, "_reason", "there is no C++ compiler")
    assert resolve_backend("kda", "auto", **words) == "chunk"
    with pytest.raises(ValueError, match=r"kda.backend='cpu'.: .*there is no C\+\+ compiler; use backend='chunk'"):
        resolve_backend("kda", "cpu", **words)
