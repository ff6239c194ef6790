"""A model that reads token by token is the model, but for the rounding of its states."""

from __future__ import annotations

import pytest
import torch

from lkda.models.stepwise import StepwiseModel
from tests.models.helpers import IDS, PATTERNS, small, tokens

BOUNDS = torch.tensor([0, 0, 2, 3, 70, 99, 99, 99], dtype=torch.int32)  # sequences of nothing, and of all lengths


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


CASES = [*((pattern, {}) for pattern in PATTERNS), (["mla"], {"mla": {"rope_base": 100.0}})]


@pytest.mark.parametrize(("pattern", "options"), CASES, ids=[*IDS, "mla_rotary"])
def test_it_is_the_whole_forward(pattern: list[str], options: dict[str, dict[str, float]]) -> None:
    mixer = {"pattern": pattern, "num_heads": 2, **options}
    model, whole, packed = small(pattern, mixer=mixer), tokens(3, 20), tokens(1, 99)
    stepwise = StepwiseModel(model)
    close(stepwise(whole), model(whole))
    close(stepwise(packed, cu_seqlens=BOUNDS), model(packed, cu_seqlens=BOUNDS))


def test_float64_stays_float64() -> None:
    model, x = small(["kda"]).double(), tokens(2, 40)
    torch.testing.assert_close(StepwiseModel(model)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.sample(2)
@pytest.mark.slow
@pytest.mark.parametrize("pattern", [["kda"], ["kda", "kda", "kda", "mla"]], ids=["kda", "hybrid"])
@torch.no_grad()
def test_narrower_states_err_more(pattern: list[str]) -> None:
    model, x = small(pattern, scale=2), tokens(2, 60)
    want = model(x)
    errors = []
    for dtype in ("float32", "bfloat16", "int8"):
        narrow = StepwiseModel(model, state_dtype=dtype)
        assert narrow.state_dtype == dtype
        errors.append(float((narrow(x) - want).norm() / want.norm()))
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < errors[2] < 0.1


def test_the_model_it_is_made_of_keeps_its_own_dtype() -> None:
    model = small(["kda"])
    StepwiseModel(model, state_dtype="int8")
    assert model.mixers()[0].init_state(1)[-1].dtype == torch.float32
    assert "kda" not in model.config["mixer"]


def test_every_step_is_told_and_they_add_up() -> None:
    model, shares = StepwiseModel(small(["kda"])), []
    model.on_step = shares.append
    model(tokens(1, 99), cu_seqlens=BOUNDS)
    assert len(shares) == 67
    assert sum(shares) == pytest.approx(1)


def test_a_dtype_that_no_state_has_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, int8, got 'float16'"):
        StepwiseModel(small(["kda"]), state_dtype="float16")
    with pytest.raises(ValueError, match="for models with KDA layers, and this one has simplified, softmax: leave it"):
        StepwiseModel(small(["simplified", "softmax"]), state_dtype="int8")
