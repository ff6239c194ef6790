"""Reads layers and options from a model's config, the dict of `build_model`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lkda.models.mixers import find_mixer


def layer_names(config: Mapping[str, Any]) -> list[str]:
    """The name of each layer's mixer."""
    pattern = config["mixer"]["pattern"]
    return [pattern[i % len(pattern)] for i in range(config["num_layers"])]


def options_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """All options of the mixer `name`, with defaults for those that the config does not set."""
    parameters = inspect.signature(find_mixer(name)).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {**defaults, **(config["mixer"].get(name) or {})}
