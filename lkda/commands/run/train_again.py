"""The command that trains a recorded run again: the choices of its configuration, and what differs from them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lkda.commands.command_line.overrides import override
from lkda.old_names import later_options, with_options
from lkda.report.read.settings import GRID_KEYS, flatten
from lkda.shipped import CONFIGS

# The groups of configs/ with the setting that names the choice.
_CHOICES = {"mixer": "mixer.name", "model": "model.name", "data": "data.source"}
_CHOICES |= {"optimizer": "optimizer.name", "scheduler": "scheduler.name"}
# What does not change the weights, or is a file of the machine that the run was on.
_OTHERS = (
    *("checkpoint.", "sample.", "logger.", "callbacks.", "resume", "debug", "experiment", *GRID_KEYS),
    *("data._target_", "data.cache_dir", "data.seed", "data.directory", "data.num_workers", "data.pin_memory"),
)
_OF_TRAINER = ("max_steps", "max_tokens", "precision", "accumulate_grad_batches", "gradient_clip_val")


def train_again(config: Mapping[str, Any]) -> str:
    """The command, for the shell. Settings that there are no more stand behind it in a comment.

    An option that came later than the run has the value that was then in effect.

    Args:
        config: the content of a run's config.yaml.
    """
    found = flatten(with_options(config, later_options(config)))
    module = str(found.get("data._target_")).split(".")[-2:][0]  # of a synthetic task, whose data has no source
    names = {group: found.get(name) for group, name in _CHOICES.items()}
    names["data"] = names["data"] or module
    chosen = {group: name for group, name in names.items() if (CONFIGS / group / f"{name}.yaml").is_file()}
    known = _defaults(tuple(f"{group}={name}" for group, name in chosen.items()))
    implied = {_CHOICES[group] for group in chosen}
    differing = {
        key: value for key, value in found.items() if _counts(key) and key not in implied and known.get(key) != value
    }
    words = [*(f"{group}={name}" for group, name in chosen.items())]
    words += [_word(key, value) for key, value in differing.items() if key in known]
    gone = sorted(f"{key}={value}" for key, value in differing.items() if key not in known and value is not None)
    comment = f"  # settings of another version: {', '.join(' '.join(one.split()) for one in gone)}" if gone else ""
    return shlex.join(["python", "scripts/train.py", *words]) + comment


def _counts(key: str) -> bool:
    if key.startswith("trainer."):
        return key.removeprefix("trainer.") in _OF_TRAINER
    return not key.startswith(_OTHERS)


@cache
def _defaults(chosen: tuple[str, ...]) -> dict[str, Any]:
    GlobalHydra.instance().clear()  # the configuration of scripts/compare.py is composed already
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=list(chosen))
    return flatten(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))


def _word(key: str, value: Any) -> str:
    if isinstance(value, str):
        return override(key, value)
    return f"{key}={_plain(value)}"


def _plain(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_plain(inner)}" for name, inner in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
