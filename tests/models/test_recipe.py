"""How weights begin, and that old configs mean what they meant."""

from __future__ import annotations

import pytest
import torch

from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.old_names import current_model_config

SIZES = {"vocab_size": 512, "d_model": 64, "num_layers": 4, "mlp_hidden": 96}


def built(**options: object) -> LanguageModel:
    torch.manual_seed(0)
    return build_model({**SIZES, "mixer": {"pattern": ["kda"], "num_heads": 2}, **options})


def test_outputs_begin_smaller_or_at_zero() -> None:
    normal, depth, zero = (built(init={"outputs": word}) for word in ("normal", "depth", "zero"))
    for block in (0, 3):
        for name in (f"blocks.{block}.mixer.o_proj.weight", f"blocks.{block}.mlp.down_proj.weight"):
            torch.testing.assert_close(depth.state_dict()[name], normal.state_dict()[name] / 8**0.5)
            assert not zero.state_dict()[name].any()
        name = f"blocks.{block}.mlp.up_proj.weight"
        assert torch.equal(zero.state_dict()[name], normal.state_dict()[name])


def test_embedding_head_and_convolutions_have_their_size() -> None:
    init = {"embedding_std": 1.0, "head_std": 0.0}
    mixer = {"pattern": ["kda"], "num_heads": 2, "kda": {"conv_std": 0.1}}
    model = built(init=init, tie_embeddings=False, mixer=mixer)
    assert model.embed_tokens.weight.detach().std() == pytest.approx(1.0, rel=0.02)
    assert not model.lm_head.weight.any()
    filters = torch.cat([w.detach().flatten() for name, w in model.named_parameters() if "conv1d" in name])
    assert filters.std() == pytest.approx(0.1, rel=0.05)
    assert filters.abs().max() > 0.25  # normal, not uniform


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"std": 1.0}, "model.init has no std; it has embedding_std, head_std, outputs"),
        ({"outputs": "small"}, "model.init.outputs must be one of normal, depth, zero, got 'small'"),
        ({"embedding_std": -1.0}, "model.init.embedding_std must be a number of 0 or more, got -1.0"),
        ({"conv_std": 0.1}, "model.init has no conv_std"),
        ({"head_std": float("nan")}, "model.init.head_std must be a number of 0 or more, got nan"),
    ],
)
def test_impossible_beginnings_are_refused(init: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(init=init)


def test_the_embedding_norm_makes_every_token_as_large() -> None:
    tokens = torch.arange(512)
    with torch.inference_mode():
        plain = built().embed(tokens).square().mean(-1).sqrt()
        normed = built(embed_norm=True).embed(tokens).square().mean(-1).sqrt()
        scaled = built(embed_scale=50.0).embed(tokens).square().mean(-1).sqrt()
    assert plain.mean() == pytest.approx(0.02, rel=0.02)
    torch.testing.assert_close(normed, torch.ones(512), rtol=0.03, atol=0)
    torch.testing.assert_close(scaled, 50 * plain)


@pytest.mark.parametrize("name", ["kda", "simplified"])
def test_an_old_config_without_convolutions_has_no_silu(name: str) -> None:
    """As it was computed when `conv_width: 0` left the SiLU out; a config of today keeps it."""
    old = {**SIZES, "mixer": {"pattern": [name], "num_heads": 2, name: {"conv_width": 0}}}
    assert current_model_config(old)["mixer"][name] == {"conv_width": 0, "activation": "none", "conv_std": None}
    assert "activation" not in old["mixer"][name]  # the caller's dict is left alone
    today = current_model_config(old)
    assert current_model_config(today) == today
    with_filters = {**SIZES, "mixer": {"pattern": [name], "num_heads": 2, name: {"conv_width": 4}}}
    translated = current_model_config(with_filters)["mixer"][name]
    assert translated == {"conv_width": 4, "activation": "silu", "conv_std": None}


@pytest.mark.parametrize("name", ["kda", "simplified", "softmax", "mla", "conv"])
def test_filters_begin_as_their_mixer_says(name: str) -> None:
    options = {"conv_width": 4, "conv_std": 0.1}
    model = built(mixer={"pattern": [name], "num_heads": 2, name: options})
    filters = torch.cat([w.detach().flatten() for path, w in model.named_parameters() if "conv1d" in path])
    assert filters.std() == pytest.approx(0.1, rel=0.05)
    assert filters.abs().max() > 0.25  # normal, not uniform


@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "conv_width": 0, "conv_std": None}], ids=["first", "later"])
def test_an_old_config_of_mla_has_no_positions(options: dict[str, object]) -> None:
    old = {**SIZES, "mixer": {"pattern": ["mla"], "num_heads": 2, "mla": {"kv_lora_rank": 20, **options}}}
    today = current_model_config(old)["mixer"]["mla"]
    assert today == {"kv_lora_rank": 20, "rope_base": None, "qk_norm": False, "conv_width": 0, "conv_std": None}
    rotary = {**SIZES, "mixer": {"pattern": ["mla"], "num_heads": 2, "mla": {**today, "rope_base": 500.0}}}
    assert current_model_config(rotary) == rotary
    assert build_model(current_model_config(old)).mixers()[0].rope_base is None


def test_filters_that_the_model_began_are_the_mixers_today() -> None:
    old = {**SIZES, "mixer": {"pattern": ["simplified"], "num_heads": 2, "simplified": {"conv_width": 4}}}
    old |= {"embed_norm": True, "init": {"conv_std": 0.02, "outputs": "zero"}}
    today = current_model_config(old)
    assert today["init"] == {"outputs": "zero"}
    assert today["mixer"]["simplified"]["conv_std"] == 0.02
