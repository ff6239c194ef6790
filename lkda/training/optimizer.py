"""Builds the optimizer and the learning-rate schedule from plain names and numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lkda.checks import InputError, check_count
from lkda.training.muon import muon
from lkda.training.options import check_names, check_number
from lkda.training.parameters import KINDS, parameter_groups

OPTIMIZERS = {
    "adamw": ("lr", "lr_scale", "betas", "eps", "weight_decay"),
    "muon": ("lr", "lr_scale", "momentum", "betas", "eps", "weight_decay"),
}
SCHEDULES = {
    "constant": ("warmup_steps",),
    "cosine": ("warmup_steps", "min_lr_ratio"),
    "wsd": ("warmup_steps", "decay_fraction", "min_lr_ratio"),
}


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Raise InputError for an unknown optimizer, an option that it does not have, or a number outside its range."""
    name = _check_choice("optimizer", config, OPTIMIZERS)
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise InputError(f"optimizer=muon needs torch 2.9 or later, got {torch.__version__}; use optimizer=adamw.")
    check_number("optimizer.lr", config["lr"], wanted="greater than 0", fits=lambda value: value > 0)
    check_number("optimizer.eps", config["eps"], wanted="greater than 0", fits=lambda value: value > 0)
    check_number("optimizer.weight_decay", config["weight_decay"], wanted="0 or more", fits=lambda value: value >= 0)
    scales = config["lr_scale"]
    if not isinstance(scales, Mapping) or set(scales) != set(KINDS):
        raise InputError(f"optimizer.lr_scale must be a number for each of {', '.join(KINDS)}, got {scales!r}.")
    for kind, scale in scales.items():
        check_number(f"optimizer.lr_scale.{kind}", scale, wanted="greater than 0", fits=lambda value: value > 0)
    betas = config["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(_is_part(beta) for beta in betas):
        raise InputError(f"optimizer.betas must be two numbers in [0, 1), got {betas!r}.")
    if name == "muon":
        check_number("optimizer.momentum", config["momentum"], wanted="in [0, 1)", fits=_is_part)


def _check_choice(group: str, config: object, choices: Mapping[str, tuple[str, ...]]) -> str:
    """The name in a group. Raises InputError if it is unknown, or if the other options are not those of this name."""
    name = config.get("name") if isinstance(config, Mapping) else config
    if not isinstance(config, Mapping) or not isinstance(name, str) or name not in choices:
        raise InputError(f"{group}.name must be one of {', '.join(choices)}, got {name!r}.")
    check_names(group, config, ("name", *choices[name]), choice=name)
    return name


def _is_part(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def build_optimizer(model: nn.Module, config: Mapping[str, Any], *, fused: bool = True) -> torch.optim.Optimizer:
    """The optimizer that `config` names.

    Args:
        model: the model to train. Weight decay acts only on matrices and on a head with a weight of its own.
        config: {"name": "adamw" or "muon", "lr", "lr_scale", "betas": [b1, b2], "eps", "weight_decay"}; muon also has
            "momentum". "lr_scale" holds factors on lr by kind of parameter; see `lkda.training.parameters`.
        fused: whether AdamW uses one fused pass over each group. Without it the optimizer takes a noticeable part of a
            step in small models. It must be False if a loss scale is removed before the clipping. The AdamW of muon is
            always fused, because `MuonWithAdamW` does not unscale.
    Raises: InputError, as `check_optimizer`.
    """
    check_optimizer(config)
    if config["name"] == "muon":
        return muon(model, config)
    groups = parameter_groups(model, lr=config["lr"], lr_scale=config["lr_scale"], weight_decay=config["weight_decay"])
    return torch.optim.AdamW(groups, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"], fused=fused)


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise InputError for an unknown schedule, an option that it does not have, or a number outside its range."""
    name = _check_choice("scheduler", config, SCHEDULES)
    check_count("scheduler.warmup_steps", config["warmup_steps"], least=0)
    if "min_lr_ratio" in SCHEDULES[name]:
        ratio = config["min_lr_ratio"]
        check_number("scheduler.min_lr_ratio", ratio, wanted="in [0, 1]", fits=lambda value: 0 <= value <= 1)
    if "decay_fraction" in SCHEDULES[name]:
        fraction = config["decay_fraction"]
        check_number("scheduler.decay_fraction", fraction, wanted="in (0, 1]", fits=lambda value: 0 < value <= 1)


def learning_rate_factor(config: Mapping[str, Any], *, step: int, total_steps: int) -> float:
    """The factor on the peak learning rate at `step`, in [0, 1].

    The schedule begins with a linear warm-up from 1 / warmup_steps. After the warm-up:
        constant   1
        cosine     half a cosine from 1 to `min_lr_ratio`
        wsd        1, then linear from 1 to `min_lr_ratio` in the last `decay_fraction` of all steps
                   (warm-up, stable, decay; arXiv:2404.06395)

    Args:
        config: {"name", "warmup_steps", ...}, already checked. cosine and wsd also have "min_lr_ratio", and wsd has
            "decay_fraction".
    """
    name, warmup = config["name"], config["warmup_steps"]
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    least = config["min_lr_ratio"]
    if name == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    remaining = (total_steps - step) / max(1.0, config["decay_fraction"] * total_steps)
    return least + (1 - least) * max(0.0, min(1.0, remaining))
