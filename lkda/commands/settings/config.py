"""From the configuration that Hydra composed to plain values."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError
from lkda.commands.command_line.examples import is_required
from lkda.commands.command_line.invocation import typed_overrides
from lkda.shipped import CONFIGS


def check_keys(config: DictConfig, command: str) -> None:
    """Raises ValueError if the command line adds a top-level key that the command's YAML does not have, as
    `+colour=red` does, or removes one that it has, as `~seed` does. An experiment may have keys of its own, to which
    its settings refer.

    Args:
        command: train, evaluate, ...: the name of the YAML.
    """
    declared = OmegaConf.load(CONFIGS / f"{command}.yaml")
    assert isinstance(declared, DictConfig)
    own = [str(key) for key in declared if key not in ("defaults", "hydra")]
    defaults = [entry for entry in declared.get("defaults", []) if isinstance(entry, DictConfig)]
    groups = [str(key) for entry in defaults for key in entry if "/" not in str(key)]
    there = list(config.keys())  # a value that is still to be given is there too
    added = {word.lstrip("+").split("=")[0].split(".")[0] for word in typed_overrides() if word.startswith("+")}
    unknown = [str(key) for key in there if key in added and key not in (*own, *groups)]
    if unknown:
        raise InputError(f"{command} has no option {unknown[0]}; it has {', '.join((*own, *groups))}.")
    missing = [key for key in own if key not in there]
    if missing:
        raise InputError(f"{command} needs its option {missing[0]}: leave ~{missing[0]} out.")


def resolve(config: DictConfig) -> dict[str, Any]:
    """The configuration as a plain dict, interpolations resolved. Raises ValueError naming a value that is required and
    missing."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(is_required(missing[0]))
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
