"""Llama and Qwen3. A model of softmax attention is a Qwen3 where it has a QK-norm, else a Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkda.formats.common.layers import layer_names, options_of


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether every layer is softmax attention."""
    return set(layer_names(config)) == {"softmax"}


def has_qk_norm(config: Mapping[str, Any]) -> bool:
    """Whether a model of softmax attention is a Qwen3 rather than a Llama."""
    return bool(options_of(config, "softmax")["qk_norm"])


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """A feature of the model that its architecture lacks, in words; None where it has all."""
    options = options_of(config, "softmax")
    if not config["mlp_hidden"]:
        return "layers without an MLP"
    if options["conv_width"]:
        return "softmax attention with convolutions"
    if options["rope_base"] is None:
        return "softmax attention without rotary positions (mixer.softmax.rope_base=null)"
    if options["qk_norm"] and options["norm_eps"] != config["norm_eps"]:
        return "a QK-norm whose norm_eps is not the model's"
    return None
