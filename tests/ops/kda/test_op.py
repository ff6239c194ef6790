"""KDA: the chunked form against the recurrence, for every gate, length and layout."""

from __future__ import annotations

import time

import pytest
import torch

from lkda.ops import KDAGate, kda_attention, kda_chunk_states, kda_step, kda_step_fused
from lkda.ops.kda.heads import in_square_heads
from lkda.ops.kda.reference.chunk import kda_chunk
from tests.ops.cases import GATES, kda_inputs, relative
from tests.ops.rounded_reference import kda_rounded_reference, kda_truth, outputs_and_gradients

NAMES = ("q", "k", "v", "g", "beta")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_chunk_equals_recurrence_in_float64(T, gate):
    inputs = kda_inputs(2, T, 2, 16, 32, gate=gate)
    got = outputs_and_gradients(kda_attention, inputs, backend="chunk")
    want = kda_truth(inputs)
    assert {name: relative(got[name], x) < 1e-12 for name, x in want.items()} == dict.fromkeys(want, True)


@pytest.mark.sample(4)
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


@pytest.mark.sample(3)
@pytest.mark.parametrize("gate", GATES)
def test_the_rounded_reference_has_the_error_of_bf16_operands(gate):
    inputs = kda_inputs(1, 200, 2, 64, 64, gate=gate, dtype=torch.bfloat16)
    truth, measured = kda_truth(inputs), kda_rounded_reference(inputs)
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
        short = kda_inputs(1, 8, 4, 64, 64, dtype=torch.float32)
        outputs_and_gradients(kda_attention, short, backend="recurrent")  # what a first call does besides
        ratio = seconds("recurrent", 1) / seconds("chunk", 10)
    finally:
        torch.set_num_threads(threads)
    assert ratio >= 10


class TestHeads:
    """More value heads than key heads, and values of another size than the keys."""

    @pytest.mark.parametrize("backend", ["cpu", "chunk", "recurrent"])
    @pytest.mark.parametrize("bounds", [None, [0, 30, 30, 70]])
    def test_value_heads_share_a_key_head(self, bounds, backend):
        """Value head i has key head i // 3, so the gradient of a key head is the sum over three value heads."""
        inputs = kda_inputs(1, 70, 6, 16, 8, gate="fast")
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        if bounds is not None:
            inputs["initial_state"] = inputs["initial_state"].repeat(3, 1, 1, 1)
        shared = {name: inputs[name][:, :, ::3].contiguous() for name in ("q", "k")}
        want = kda_truth(
            inputs | {name: x.repeat_interleave(3, 2) for name, x in shared.items()}, cu_seqlens=cu_seqlens
        )
        for name in ("dq", "dk"):
            want[name] = want[name].unflatten(2, (2, 3)).sum(3)
        got = outputs_and_gradients(kda_attention, inputs | shared, cu_seqlens=cu_seqlens, backend=backend)
        assert {name: relative(got[name], x) < 1e-12 for name, x in want.items()} == dict.fromkeys(want, True)

    @pytest.mark.parametrize("V", [5, 16, 40])
    def test_square_heads_give_any_size_of_values(self, V):
        """What the CUDA kernels are called with, which have K = V."""
        inputs = kda_inputs(2, 70, 2, 16, V, gate="fast")

        def square(q, k, v, g, beta, scale, initial_state, cu_seqlens):
            assert q.shape == k.shape == v.shape == g.shape
            return kda_chunk(q, k, v, g, beta, scale, initial_state, cu_seqlens)

        def op(q, k, v, g, beta, initial_state):
            return in_square_heads(square, q, k, v, g, beta, 0.25, initial_state, None)

        got, want = outputs_and_gradients(op, inputs), kda_truth(inputs)
        assert {name: relative(got[name], x) < 1e-12 for name, x in want.items()} == dict.fromkeys(want, True)
        row = [inputs[name][:1] for name in NAMES]
        o, state = in_square_heads(square, *row, 0.25, None, torch.tensor([0, 30, 70]))
        assert (o.shape, state.shape) == ((1, 70, 2, V), (2, 2, 16, V))

    def test_a_step_has_them_too(self):
        inputs = kda_inputs(2, 3, 4, 16, 8, gate="fast")
        inputs |= {name: inputs[name][:, :, ::2] for name in ("q", "k")}
        want, final = kda_attention(**inputs, backend="recurrent")
        state = inputs["initial_state"]
        for t in range(3):
            o, state = kda_step(*(inputs[n][:, t] for n in NAMES), state)
            assert relative(o, want[:, t]) < 1e-12
        assert relative(state, final) < 1e-12

    def test_a_number_of_heads_that_does_not_divide_is_named(self):
        inputs = kda_inputs(1, 8, 3, 16, 16)
        inputs |= {name: inputs[name][:, :, :2] for name in ("q", "k")}
        message = r"v must have as many heads as q and k, 2, or a multiple of that, got \[1, 8, 3, 16\]"
        with pytest.raises(ValueError, match=message):
            kda_attention(**inputs)
        with pytest.raises(ValueError, match=message.replace("1, 8, 3", "1, 3")):
            kda_step(*(inputs[name][:, 0] for name in NAMES), inputs["initial_state"])

    def test_the_fused_step_refuses_them_and_names_what_does_not(self):
        q, v, beta = torch.zeros(2, 2, 32), torch.zeros(2, 4, 32), torch.zeros(2, 4)
        with pytest.raises(ValueError, match=r"\[2, 2, 32\], got \[2, 4, 32\]; for other heads call `kda_gate`"):
            kda_step_fused(q, q, v, None, beta, KDAGate(), (torch.zeros(2, 4, 32, 32),))


@pytest.mark.parametrize("backend", ["cpu", "chunk"])
def test_what_is_not_normalized_is_divided_by_its_norm(backend):
    inputs = kda_inputs(2, 20, 2, 16, 16, gate="fast")
    want = outputs_and_gradients(kda_attention, inputs)
    longer = inputs | {name: 3 * inputs[name] for name in ("q", "k")}
    got = outputs_and_gradients(kda_attention, longer, normalized=False, backend=backend)
    for name in ("o", "final_state", "dv", "dg", "dbeta", "dinitial_state"):
        assert relative(got[name], want[name]) < 1e-6, name  # the norm has an eps of 1e-6 inside


class TestChunkStates:
    @pytest.mark.parametrize("T", [16, 40])
    def test_they_are_the_states_before_each_chunk(self, T):
        inputs = kda_inputs(2, T, 2, 16, 8, gate="fast")
        o, final, states = kda_chunk_states(**inputs, chunk_size=16)
        want, want_final = kda_attention(**inputs)
        assert relative(o, want) < 1e-12
        assert relative(final, want_final) < 1e-12
        assert states.shape == (2, -(-T // 16), 2, 16, 8)
        for m, state in enumerate(states.unbind(1)):
            before = {name: inputs[name][:, : 16 * m] for name in NAMES}
            want = inputs["initial_state"] if m == 0 else kda_attention(**inputs | before)[1]
            assert relative(state, want) < 1e-12

    def test_packed_sequences_have_their_own_chunks(self):
        bounds = [0, 20, 20, 36]
        inputs = kda_inputs(1, 36, 2, 16, 16, gate="fast")
        inputs.pop("initial_state")
        o, final, states = kda_chunk_states(**inputs, chunk_size=16, cu_seqlens=torch.tensor(bounds))
        want, want_final = kda_attention(**inputs, cu_seqlens=torch.tensor(bounds))
        assert relative(o, want) < 1e-12
        assert torch.equal(final[1], want_final[1])
        assert relative(final, want_final) < 1e-12
        assert states.shape == (1, 3, 2, 16, 16)  # of 16 + 4, 0 and 16 tokens
        assert not states[0, 0].any()
        assert relative(states[0, 1], kda_attention(*(inputs[n][:, :16] for n in NAMES))[1][0]) < 1e-12
        assert not states[0, 2].any()


@pytest.mark.parametrize("backend", ["cpu", "chunk", "recurrent"])
def test_a_scale_may_be_a_whole_number(backend):
    """A C++ function would read an int from another register than a float."""
    inputs = kda_inputs(1, 20, 1, 16, 16)
    got, want = (kda_attention(**inputs, scale=scale, backend=backend) for scale in (2, 2.0))
    assert torch.equal(got[0], want[0])
