"""Configs of models that were written before an option existed, in today's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a saved model as `build_model` takes it today, so that the model computes what it computed.

    A config without `embed_norm` is from the time when KDA and simplified attention had no SiLU where they had no
    convolution. Every other option that it lacks has, where it is missing, the value of that time.
    """
    if "embed_norm" in config or not isinstance(config.get("mixer"), Mapping):
        return dict(config)
    mixer = dict(config["mixer"])
    for name in ("kda", "simplified"):
        if (mixer.get(name) or {}).get("conv_width") == 0:
            mixer[name] = {"activation": "none", **mixer[name]}
    return {**config, "mixer": mixer}
