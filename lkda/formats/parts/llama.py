"""Llama, which a model of rotary softmax attention alone is: what of ours fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkda.formats.parts.layers import layer_names


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether every layer is softmax attention."""
    return set(layer_names(config)) == {"softmax"}


def obstacle(config: Mapping[str, Any]) -> str | None:
    """What Llama does not have, in a few words; None where it has everything."""
    return None if config["mlp_hidden"] else "layers without an MLP"
