"""Builds a model from a config and weights, after checking that they fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel


def build_with_weights(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    source: object,
    backend: str = "auto",
    stored_as: Callable[[str], str] = str,
) -> LanguageModel:
    """The model of `config` with `weights`, in float32, on the CPU and in eval mode.

    Args:
        config: of `build_model`.
        weights: by the names that they have in `source`.
        stored_as: name of a parameter in lkda -> its name in `weights`.
    Raises:
        ValueError: a tensor is missing, unknown or has another shape. The message names the first one and `source`.
    """
    _check_depth(config, weights, source, stored_as)
    with torch.device("meta"):
        model = build_model({**config, "backend": backend})
    shapes = {stored_as(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(shapes.keys() | weights.keys()):
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = shapes.get(name, "unknown")
        if there != here:
            raise InputError(f"{source} holds the weights of another model: {name} is {there}, expected {here}.")
    own = {name: weights[stored_as(name)].float() for name in model.state_dict()}
    return assign(model, own).eval()


def assign(model: LanguageModel, weights: Mapping[str, Tensor]) -> LanguageModel:
    """Makes `weights` the parameters of a model that was built on the meta device."""
    model.load_state_dict(dict(weights), assign=True)
    if model.config["tie_embeddings"]:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _check_depth(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], source: object, stored_as: Callable[[str], str]
) -> None:
    """Raises ValueError where num_layers is wrong, before building that many layers."""
    before, after = stored_as("blocks.0.mixer_norm.weight").split("0", 1)
    found = sum(name.startswith(before) and name.endswith(after) for name in weights)
    if isinstance(config.get("num_layers"), int) and config["num_layers"] != found:
        raise InputError(
            f"{source} holds the weights of {found} layers, and its config asks for {config['num_layers']}."
        )
