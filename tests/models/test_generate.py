"""The decoding loop."""

from __future__ import annotations

import pytest
import torch

from lkda.models import generate
from tests.models.helpers import IDS, PATTERNS, small, tokens


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
def test_greedy_takes_the_likeliest_token_of_the_whole(pattern):
    model, x = small(pattern), tokens(1, 7)
    drawn = list(generate(model, x, max_new_tokens=8, temperature=0))
    for token in drawn:
        assert token == int(model(x)[0, -1].argmax())
        x = torch.cat([x, torch.tensor([[token]])], 1)
    assert len(drawn) == 8


def test_a_seed_repeats_the_draws():
    model, x = small(["kda"]), tokens(1, 5)
    one, two, other = (list(generate(model, x, max_new_tokens=30, seed=seed)) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_narrow_states_repeat_the_draws(state_dtype):
    """Rounding at random is no source of randomness: the same prompt and seed give the same tokens."""
    options = {"pattern": ["kda"], "num_heads": 2, "kda": {"state_dtype": state_dtype}}
    model, x = small(["kda"], mixer=options), tokens(1, 5)
    one, two = (list(generate(model, x, max_new_tokens=30, seed=1)) for _ in range(2))
    assert one == two


def test_top_p_draws_from_the_fewest_tokens_that_reach_it():
    model, x = small(["kda"]), tokens(1, 5)
    greedy = list(generate(model, x, max_new_tokens=10, temperature=0))
    assert list(generate(model, x, max_new_tokens=10, top_p=1e-6, seed=3)) == greedy


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_a_temperature_of_nearly_0_takes_the_likeliest_token(temperature):
    model, x = small(["kda"]), tokens(1, 5)
    greedy = list(generate(model, x, max_new_tokens=10, temperature=0))
    assert list(generate(model, x, max_new_tokens=10, temperature=temperature, seed=3)) == greedy


def test_an_end_token_ends_the_text():
    model, x = small(["kda"]), tokens(1, 5)
    drawn = list(generate(model, x, max_new_tokens=10, temperature=0))
    end = drawn[4]
    assert list(generate(model, x, max_new_tokens=10, temperature=0, end_tokens=[end])) == drawn[: drawn.index(end)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be a number of 0 or more"),
        ({"temperature": True}, "temperature must be a number of 0 or more"),
        ({"top_p": True}, "top_p must be above 0 and at most 1"),
        ({"temperature": "hot"}, "temperature must be a number of 0 or more"),
        ({"max_new_tokens": 1.5}, "whole number of 0 or more, got 1.5"),
        ({"temperature": -1.0}, "temperature must be a number of 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"max_new_tokens": -1}, "whole number of 0 or more, got -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        list(generate(small(["kda"]), tokens(1, 5), **({"max_new_tokens": 1} | options)))


@pytest.mark.parametrize("token", [-1, 50])
def test_a_token_that_the_model_does_not_know_is_refused(token):
    with pytest.raises(ValueError, match=r"the prompt holds token ids from .* knows 0 to 49; encode the prompt"):
        list(generate(small(["kda"]), torch.tensor([[3, token]]), max_new_tokens=1))
