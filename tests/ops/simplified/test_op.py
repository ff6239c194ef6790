"""Simplified linear attention: the chunked form against the recurrence."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import simplified_attention, simplified_step
from tests.ops.cases import relative, simplified_inputs
from tests.ops.rounded_reference import outputs_and_gradients

NAMES = ("q", "k", "v", "decay")


def truth(inputs, **options):
    inputs = {name: x.double() for name, x in inputs.items()}
    return outputs_and_gradients(simplified_attention, inputs, backend="recurrent", **options)


@pytest.mark.parametrize("memory", [1e5, 30.0, 1.0])
@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
def test_chunk_equals_recurrence_in_float64(T, memory):
    inputs = simplified_inputs(2, T, 2, 8, memory=memory)
    got = outputs_and_gradients(simplified_attention, inputs, backend="chunk")
    for name, want in truth(inputs).items():
        assert relative(got[name], want) < 1e-11, name


@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_chunk_float32_errs_by_rounding_alone(D):
    inputs = simplified_inputs(1, 1000, 1, D, dtype=torch.float32)
    got = outputs_and_gradients(simplified_attention, inputs, backend="chunk")
    for name, want in truth(inputs).items():
        assert relative(got[name], want) < (1e-4 if name == "ddecay" else 1e-5), name


def test_chunk_bfloat16_inputs_err_by_the_rounding_of_what_is_stored():
    inputs = simplified_inputs(2, 130, 2, 32, dtype=torch.bfloat16)
    got = outputs_and_gradients(simplified_attention, inputs, backend="chunk")
    for name, want in truth(inputs).items():
        assert relative(got[name], want) < 3e-3, name


def test_packed_sequences_equal_the_recurrence_with_empty_ones():
    inputs = simplified_inputs(1, 150, 2, 8)
    inputs["initial_state"] = inputs["initial_state"].repeat(5, 1, 1, 1)
    bounds = torch.tensor([0, 0, 3, 140, 150, 150])
    got = outputs_and_gradients(simplified_attention, inputs, cu_seqlens=bounds, backend="chunk")
    for name, want in truth(inputs, cu_seqlens=bounds).items():
        assert relative(got[name], want) < 1e-11, name


def test_a_decay_per_head_is_that_decay_at_every_token():
    inputs = simplified_inputs(2, 70, 3, 8)
    decay = torch.tensor([0.9, 0.999, 1.0], dtype=torch.float64)
    got = outputs_and_gradients(simplified_attention, inputs | {"decay": decay}, backend="chunk")
    want = truth(inputs | {"decay": decay.expand(2, 70, 3)})
    assert relative(got["o"], want["o"]) < 1e-12
    assert relative(got["ddecay"], want["ddecay"].sum((0, 1))) < 1e-11


@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
@pytest.mark.parametrize("key", [-100.0, 100.0])
def test_extreme_keys_stay_finite(key, backend):
    inputs = simplified_inputs(1, 70, 1, 8, dtype=torch.float32)
    inputs["k"] = torch.full_like(inputs["k"], key)
    inputs["initial_state"] = torch.zeros_like(inputs["initial_state"])
    got = outputs_and_gradients(simplified_attention, inputs, backend=backend)
    assert all(x.isfinite().all() for x in got.values())


def test_chunk_passes_gradcheck_through_every_input_and_both_outputs():
    inputs = {name: x.requires_grad_() for name, x in simplified_inputs(1, 70, 2, 3).items()}

    def op(*tensors):
        return simplified_attention(*tensors[:4], initial_state=tensors[4], backend="chunk")

    assert torch.autograd.gradcheck(op, tuple(inputs.values()), fast_mode=True)


def test_future_tokens_never_change_past_outputs_bitwise():
    one, two = (simplified_inputs(1, 150, 2, 16, dtype=torch.float32, seed=seed) for seed in (0, 1))
    for t in (1, 37, 64, 101):
        mixed = {name: torch.cat([one[name][:, :t], two[name][:, t:]], 1) for name in NAMES}
        o, _ = simplified_attention(*(one[n] for n in NAMES), backend="chunk")
        changed, _ = simplified_attention(**mixed, backend="chunk")
        assert torch.equal(o[:, :t], changed[:, :t])


def test_steps_equal_the_whole():
    inputs = simplified_inputs(2, 20, 2, 8)
    want, final = simplified_attention(**inputs, backend="recurrent")
    state = inputs["initial_state"]
    for t in range(20):
        o, state = simplified_step(*(inputs[n][:, t] for n in NAMES), state)
        assert relative(o, want[:, t]) < 1e-12
    assert relative(state, final) < 1e-12


def test_a_state_of_the_wrong_shape_is_named():
    inputs = simplified_inputs(2, 8, 2, 8)
    inputs["initial_state"] = inputs["initial_state"][:, :, 0]
    with pytest.raises(ValueError, match=r"initial_state must be \[B, H, 2, D\], got a shape of \[2, 2, 8\]"):
        simplified_attention(**inputs)
