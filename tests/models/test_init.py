"""Every layer initialises itself: alone, in a model, and after it was built without memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lkda.models import build_model
from lkda.models.block import Block
from lkda.models.mixer import Mixer
from lkda.models.mixers import find_mixer, mixer_names
from lkda.models.mlp import SwiGLU
from lkda.models.norm import GatedHeadNorm
from lkda.models.short_conv import ShortConvolution
from tests.models.helpers import IDS, PATTERNS, config, tokens

D, HEADS = 64, 2
# Values of options that change which weights there are.
CHOICES = {
    "conv_width": [0, 2],
    "qk_norm": [True],
    "gate": ["head", "none"],
    "decay": ["constant"],
    "output_gate": [False],
    "output_norm": [False],
    "kv_lora_rank": [8],
}


def mixers() -> dict[str, Callable[[], Mixer]]:
    """Each mixer that is found, as it is and with each other choice of an option that it has."""
    found: dict[str, Callable[[], Mixer]] = {}
    for name in mixer_names():
        cls = find_mixer(name)
        found[name] = lambda cls=cls: cls(D, HEADS)
        for option, values in CHOICES.items():
            if option in inspect.signature(cls).parameters and (name, option) != ("conv", "conv_width"):
                for value in values:
                    options = {option: value} | ({"output_gate": False} if option == "output_norm" else {})
                    found[f"{name} {option}={value}"] = lambda cls=cls, options=options: cls(D, HEADS, **options)
    return found


MIXERS = mixers()
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **MIXERS,
    "short convolution": lambda: ShortConvolution(D, 4),
    "head norm": lambda: GatedHeadNorm(D),
    "mlp": lambda: SwiGLU(D, 2 * D),
    "block": lambda: Block(find_mixer("kda")(D, HEADS), D, mlp_hidden=2 * D, norm_eps=1e-5),
}


@pytest.fixture(autouse=True)
def fresh_memory_is_not_a_number():
    """What is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
    torch.use_deterministic_algorithms(before[0])


def output(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x, gate=x) if isinstance(layer, GatedHeadNorm) else layer(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_alone_trains(kind):
    layer = LAYERS[kind]()
    x, target = torch.randn(2, 40, D), torch.randn(2, 40, D)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        y = output(layer, x)
        losses.append((y - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
    assert y.isfinite().all()
    assert 0 < y.std() < 2
    assert losses[1] < losses[0]


def same_distributions(one: nn.Module, other: nn.Module) -> None:
    """Weights of the same names, and about the same means and deviations."""
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(one.named_parameters()).keys()
    for name, own in one.named_parameters():
        assert own.isfinite().all(), name
        # Four deviations of the estimate, from the fewest values there are; exactly equal where nothing is drawn.
        few = 4 * max(own.std(correction=0), theirs[name].std(correction=0)) / own.numel() ** 0.5
        assert (own.mean() - theirs[name].mean()).abs() <= 2 * few + 1e-6, name
        assert (own.std(correction=0) - theirs[name].std(correction=0)).abs() <= 2 * few + 1e-6, name


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_was_built_without_memory_is_as_one_built_with_it(kind):
    with torch.device("meta"):
        layer = LAYERS[kind]()
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    same_distributions(layer, LAYERS[kind]())


@pytest.mark.parametrize("pattern", PATTERNS, ids=IDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_was_built_without_memory_is_as_one_built_with_it(pattern, tied):
    with torch.device("meta"):
        model = build_model(config(pattern, tie_embeddings=tied))
    model.to_empty(device="cpu")
    model.reset_parameters()
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    same_distributions(model, build_model(config(pattern, tie_embeddings=tied)))
    assert model(tokens(1, 20)).isfinite().all()


# The last two weights of each, from a seed of 0: what runs of a seed are compared by must not change.
OF_SEED_0 = {
    "embed_tokens.weight": [-0.038946, -0.026325],
    "blocks.0.mixer.A_log": [1.726743, 2.542218],
    "blocks.0.mixer.dt_bias": [-5.176541, -4.173282],
    "blocks.0.mixer.q_conv1d.weight": [0.225644, 0.347456],
    "blocks.1.mixer.v_conv1d.weight": [0.067917, 0.429238],
    "blocks.1.mixer.o_proj.weight": [0.001944, -0.010344],
}


def test_a_seed_keeps_its_weights():
    """Self-initialising layers draw in their constructors; in a model they leave its order of drawing alone."""
    torch.manual_seed(0)
    weights = build_model(config(["kda", "simplified"])).state_dict()
    for name, last in OF_SEED_0.items():
        assert weights[name].flatten()[-2:].tolist() == pytest.approx(last, abs=1e-5), name


@torch.no_grad()
def test_weights_begin_as_the_documentation_says():
    model = build_model(config(["kda"], d_model=128, vocab_size=500))
    mixer = model.mixers()[0]
    assert model.embed_tokens.weight.std() == pytest.approx(0.02, rel=0.05)
    assert mixer.q_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    assert mixer.q_conv1d.weight.abs().max() <= 0.5
    assert mixer.q_conv1d.weight.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert not torch.equal(mixer.q_conv1d.weight, mixer.k_conv1d.weight)
    rates, steps = mixer.A_log.exp(), torch.nn.functional.softplus(mixer.dt_bias)
    assert (rates >= 1).all()
    assert (rates <= 16).all()
    assert 9e-4 < steps.min() < steps.max() < 0.11
    assert (mixer.o_norm.weight == 1).all()
