"""KDA: the chunked form against the recurrence, for every gate, length and layout."""

from __future__ import annotations

import time

import pytest
import torch

from lkda.ops import kda_attention, kda_step
from tests.ops.cases import GATES, kda_inputs, relative
from tests.ops.yardstick import kda_truth, kda_yardstick, outputs_and_gradients

NAMES = ("q", "k", "v", "g", "beta")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_chunk_equals_recurrence_in_float64(T, gate):
    inputs = kda_inputs(2, T, 2, 16, 32, gate=gate)
    got = outputs_and_gradients(kda_attention, inputs, backend="chunk")
    want = kda_truth(inputs)
    assert {name: relative(got[name], x) < 1e-12 for name, x in want.items()} == dict.fromkeys(want, True)


@pytest.mark.parametrize("K", [32, 64, 96, 128])
def test_chunk_float32_at_1000_tokens_errs_by_rounding_alone(K):
    inputs = kda_inputs(1, 1000, 1, K, K, gate="resets", dtype=torch.float32)
    got = outputs_and_gradients(kda_attention, inputs, backend="chunk")
    for name, want in kda_truth(inputs).items():
        assert relative(got[name], want) < 3e-5, name


@pytest.mark.parametrize("gate", GATES)
def test_chunk_bfloat16_inputs_err_by_the_rounding_of_what_is_stored(gate):
    inputs = kda_inputs(1, 130, 2, 32, 32, gate=gate, dtype=torch.bfloat16)
    got = outputs_and_gradients(kda_attention, inputs, backend="chunk")
    assert got["o"].dtype == torch.bfloat16
    assert got["final_state"].dtype == torch.float32
    for name, want in kda_truth(inputs).items():
        assert relative(got[name], want) < 3e-3, name


@pytest.mark.parametrize("gate", GATES)
def test_yardstick_is_the_error_of_bf16_operands(gate):
    inputs = kda_inputs(1, 200, 2, 64, 64, gate=gate, dtype=torch.bfloat16)
    truth, measured = kda_truth(inputs), kda_yardstick(inputs)
    errors = {name: relative(measured[name], want) for name, want in truth.items()}
    assert all(1e-4 < error < 1e-2 for error in errors.values()), errors


@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
def test_packed_sequences_equal_each_alone(backend):
    bounds = [0, 0, 70, 71, 71, 200, 200]
    packed = kda_inputs(1, 200, 2, 16, 16, gate="resets")
    packed["initial_state"] = torch.randn(6, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    o, states = kda_attention(**packed, cu_seqlens=torch.tensor(bounds), backend=backend)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        if start == end:
            assert torch.equal(states[n], packed["initial_state"][n])
            continue
        alone = {name: packed[name][:, start:end] for name in NAMES}
        want, state = kda_attention(**alone, initial_state=packed["initial_state"][n : n + 1], backend="recurrent")
        assert relative(o[:, start:end], want) < 1e-12
        assert relative(states[n], state[0]) < 1e-12


def test_packed_gradients_equal_the_recurrence():
    inputs = kda_inputs(1, 150, 2, 16, 16, gate="mixed")
    inputs["initial_state"] = inputs["initial_state"].repeat(4, 1, 1, 1)
    bounds = torch.tensor([0, 3, 3, 140, 150], dtype=torch.int32)
    got = outputs_and_gradients(kda_attention, inputs, cu_seqlens=bounds, backend="chunk")
    for name, want in kda_truth(inputs, cu_seqlens=bounds).items():
        assert relative(got[name], want) < 1e-12, name


def test_chunk_passes_gradcheck_through_every_input_and_both_outputs():
    inputs = {name: x.requires_grad_() for name, x in kda_inputs(1, 70, 1, 4, 3, gate="fast").items()}

    def op(*tensors):
        return kda_attention(*tensors[:5], initial_state=tensors[5], backend="chunk")

    assert torch.autograd.gradcheck(op, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("gate", ["slow", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_future_tokens_never_change_past_outputs_bitwise(gate, dtype):
    one, two = (kda_inputs(1, 150, 2, 32, 32, gate=gate, dtype=dtype, seed=seed) for seed in (0, 1))
    for t in (1, 37, 64, 101):
        mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in NAMES}
        o, _ = kda_attention(*(one[n] for n in NAMES), backend="chunk")
        changed, _ = kda_attention(**mixed, backend="chunk")
        assert torch.equal(o[:, :t], changed[:, :t])


def test_inputs_may_be_strided():
    inputs = kda_inputs(2, 70, 2, 32, 32, dtype=torch.float32)
    strided = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert not strided["q"].is_contiguous()
    got = outputs_and_gradients(kda_attention, strided, backend="chunk")
    for name, want in outputs_and_gradients(kda_attention, inputs, backend="chunk").items():
        assert torch.equal(got[name], want), name


def test_minus_infinity_forgets_everything():
    inputs = kda_inputs(1, 100, 1, 16, 16)
    inputs["g"][:, 40] = -torch.inf
    o, state = kda_attention(**inputs, backend="chunk")
    fresh, want = kda_attention(*(inputs[n][:, 40:] for n in NAMES), backend="recurrent")
    assert relative(o[:, 40:], fresh) < 1e-12
    assert relative(state, want) < 1e-12


def test_steps_equal_the_whole():
    inputs = kda_inputs(2, 20, 2, 16, 16, gate="fast")
    want, final = kda_attention(**inputs, backend="recurrent")
    state = inputs["initial_state"]
    for t in range(20):
        o, state = kda_step(*(inputs[n][:, t] for n in NAMES), state)
        assert relative(o, want[:, t]) < 1e-12
    assert relative(state, final) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 8, 2, 8)}, r"kda_attention: k must be \[B, T, H, K\] = \[2, 8, 2, 16\], got \[2, 8, 2, 8\]"),
        ({"beta": (2, 8, 2, 1)}, r"kda_attention: beta must be \[B, T, H\], got a shape of \[2, 8, 2, 1\]"),
        ({"initial_state": (1, 2, 16, 16)}, r"initial_state must be \[B, H, K, V\] = \[2, 2, 16, 16\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(change, message):
    inputs = kda_inputs(2, 8, 2, 16, 16) | {name: torch.zeros(shape).double() for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        kda_attention(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "backend must be one of auto, .*chunk, recurrent, got 'fast'"),
        ({"cu_seqlens": torch.tensor([0, 9, 8])}, "must go from 0 to T = 8 and never fall"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens must be int32 or int64"),
    ],
)
def test_an_option_that_does_not_fit_is_named(options, message):
    inputs = kda_inputs(1, 8, 2, 16, 16)
    inputs.pop("initial_state")
    with pytest.raises(ValueError, match=message):
        kda_attention(**inputs, **options)


def test_mixed_dtypes_are_refused():
    inputs = kda_inputs(1, 8, 2, 16, 16)
    inputs["v"] = inputs["v"].float()
    with pytest.raises(ValueError, match=r"v is torch.float32 and q torch.float64; cast one of them"):
        kda_attention(**inputs)


@pytest.mark.serial
def test_chunk_is_ten_times_faster_than_the_recurrence_on_two_threads():
    inputs = kda_inputs(1, 512, 4, 64, 64, dtype=torch.float32)

    def seconds(backend: str, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            outputs_and_gradients(kda_attention, inputs, backend=backend)
            times.append(time.perf_counter() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ratio = seconds("recurrent", 2) / seconds("chunk", 10)
    finally:
        torch.set_num_threads(threads)
    assert ratio >= 10


def test_a_state_that_is_not_square_runs_where_kernels_only_keep_square_ones():
    inputs = kda_inputs(1, 8, 1, 32, 16)
    assert kda_attention(**inputs)[1].shape == (1, 1, 32, 16)
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, chunk, recurrent, got 'cuda'"):
        kda_attention(**inputs, backend="cuda")
