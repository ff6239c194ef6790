"""Kimi Linear (arXiv:2510.26692) as transformers, vLLM, SGLang, mlx-lm and llama.cpp define it: what of ours fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lkda.formats.common.building import assign
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.writing import weights_of
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.models.mixers.kda import KimiDeltaAttention
from lkda.models.mixers.mla import MultiHeadLatentAttention

# Readers take every norm's eps from rms_norm_eps, or fix it to this.
NORM_EPS = 1e-5
# What no reader has: option of `kda`, the value that they have, and how it is called.
_FIXED = (
    ("gate", "channel", "a KDA gate a head, or none"),
    ("gate_form", "softplus", "the bounded gate of KDA"),
    ("negative_eigenvalues", False, "KDA with negative eigenvalues"),
    ("output_gate", True, "KDA without an output gate"),
)


def obstacle(config: Mapping[str, Any]) -> str | None:
    """What of a model's config Kimi Linear does not have, in a few words; None where it has everything."""
    names = set(layer_names(config))
    if not names <= {"kda", "mla"}:
        return f"a pattern with {', '.join(sorted(names - {'kda', 'mla'}))}"
    if not config["mlp_hidden"]:
        return "layers without an MLP"
    if "mla" in names:
        options = options_of(config, "mla")
        if options["conv_width"]:
            return "MLA with convolutions"
        if options["qk_norm"]:
            return "MLA with a QK-norm"
    if "kda" in names:
        options = options_of(config, "kda")
        if options["conv_width"] == 0:
            return "KDA without convolutions"
        if config["norm_eps"] != NORM_EPS:
            return f"KDA with a norm_eps other than {NORM_EPS}"
        for option, value, words in _FIXED:
            if options[option] != value:
                return words
    return None


def both_kinds(model: LanguageModel) -> LanguageModel:
    """The model with a last layer of the kind, KDA or MLA, that it lacks; the new layer adds nothing.

    Readers size their caches by a layer of each kind. Its weights are zeros, so what it adds to the residual is zero.
    """
    names = layer_names(model.config)
    lacking = {"kda", "mla"} - set(names)
    if not lacking:
        return model
    mixer = {**model.config["mixer"], "pattern": [*names, lacking.pop()]}
    with torch.device("meta"):
        longer = build_model({**model.config, "num_layers": len(names) + 1, "mixer": mixer})
    own = weights_of(model)
    norms = ("norm.weight", "layernorm.weight")
    added = {
        name: (torch.ones if name.endswith(norms) else torch.zeros)(tensor.shape)
        for name, tensor in longer.state_dict().items()
        if name not in own
    }
    return assign(longer, own | added)


def adds_nothing(weights: Mapping[str, Tensor], last: int, stored_as: Any) -> bool:
    """Whether layer `last` leaves the residual stream as it is, as that of `both_kinds` does."""
    outputs = (stored_as(f"blocks.{last}.{name}.weight") for name in ("mixer.o_proj", "mlp.down_proj"))
    return all(name in weights and not weights[name].any() for name in outputs)


def with_scaled_latent(weights: Mapping[str, Tensor], model: LanguageModel, factor: float) -> dict[str, Tensor]:
    """The weights with the rows of MLA that make the latent c times `factor`.

    RMSNorm(s c; s^2 eps) = RMSNorm(c; eps), so a factor of s stands for a reader's eps that is s^2 times ours.
    """
    changed = dict(weights)
    for i, mixer in enumerate(model.mixers()):
        if isinstance(mixer, MultiHeadLatentAttention):
            name = f"blocks.{i}.mixer.kv_a_proj_with_mqa.weight"
            scale = torch.ones(mixer.rank + mixer.rope, 1)
            scale[: mixer.rank] = factor
            changed[name] = changed[name] * scale
    return changed


def latent_eps(config: Mapping[str, Any]) -> float:
    """The eps of the norm of MLA's latent."""
    return float(options_of(config, "mla")["norm_eps"])


def kinds(model: LanguageModel) -> tuple[KimiDeltaAttention, MultiHeadLatentAttention]:
    """A layer of each kind of a model of `both_kinds`, to read their sizes from."""
    mixers = model.mixers()
    kda = next(mixer for mixer in mixers if isinstance(mixer, KimiDeltaAttention))
    mla = next(mixer for mixer in mixers if isinstance(mixer, MultiHeadLatentAttention))
    return kda, mla
