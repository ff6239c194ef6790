"""Converts the configuration that Hydra composed to plain values."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError


def resolve(config: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict with all interpolations resolved.

    Raises: InputError if a required value is missing. The message names it.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
