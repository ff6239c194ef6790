"""Kimi Linear (arXiv:2510.26692) as transformers, vLLM, SGLang, mlx-lm and llama.cpp define it."""

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

# The other tools take the eps of every norm from rms_norm_eps, or always use this one.
NORM_EPS = 1e-5
# Options of `kda`, the only value that the other tools support, and the words for any other value.
_FIXED = (
    ("gate", "channel", "a KDA gate per head, or none"),
    ("gate_form", "softplus", "the bounded gate of KDA"),
    ("negative_eigenvalues", False, "KDA with negative eigenvalues"),
    ("output_gate", True, "KDA without an output gate"),
)


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """A feature of the model that Kimi Linear lacks, in words; None where it has all."""
    names = set(layer_names(config))
    if not names <= {"kda", "mla"}:
        return f"a pattern with {', '.join(sorted(names - {'kda', 'mla'}))}"
    if not config["mlp_hidden"]:
        return "layers without an MLP"
    if "mla" in names:
        options = options_of(config, "mla")
        if options["conv_width"]:
            return "MLA with convolutions"
        if options["rope_base"] is not None:
            return "MLA with rotary positions (mixer.mla.rope_base)"
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
    """The model, with a last layer of the kind that it lacks, KDA or MLA.

    Other tools need a layer of each kind to size their caches. The weights of the new layer are zero, so it adds zero
    to the residual stream.
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
    """Whether layer `last` adds zero to the residual stream, as the one of `both_kinds` does."""
    outputs = (stored_as(f"blocks.{last}.{name}.weight") for name in ("mixer.o_proj", "mlp.down_proj"))
    return all(name in weights and not weights[name].any() for name in outputs)


def with_scaled_latent(weights: Mapping[str, Tensor], model: LanguageModel, factor: float) -> dict[str, Tensor]:
    """The weights, with the rows that make the latent c of MLA multiplied by `factor`.

    RMSNorm(s c; s^2 eps) = RMSNorm(c; eps). So with a factor of s, a tool whose eps is s^2 times that of lkda computes
    the same.
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
    """A KDA and an MLA layer of a model of `both_kinds`, to read their sizes from."""
    mixers = model.mixers()
    kda = next(mixer for mixer in mixers if isinstance(mixer, KimiDeltaAttention))
    mla = next(mixer for mixer in mixers if isinstance(mixer, MultiHeadLatentAttention))
    return kda, mla
