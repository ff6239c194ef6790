"""From plain names and numbers to an optimiser and a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lkda.training.muon import muon
from lkda.training.parameters import KINDS, parameter_groups

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown optimiser, or a number out of its range."""
    if config["name"] not in OPTIMIZERS:
        raise ValueError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, got {config['name']!r}.")
    if config["name"] == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer=muon needs torch 2.9 or later, this is {torch.__version__}; use optimizer=adamw.")
    if not config["lr"] > 0:
        raise ValueError(f"optimizer.lr must be greater than 0, got {config['lr']}.")
    if config["weight_decay"] < 0:
        raise ValueError(f"optimizer.weight_decay must be 0 or more, got {config['weight_decay']}.")
    for kind, scale in config.get("lr_scale", {}).items():
        if kind not in KINDS:
            raise ValueError(f"optimizer.lr_scale is by {', '.join(KINDS)}; there is no {kind!r}.")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"optimizer.lr_scale.{kind} must be a number greater than 0, got {scale!r}.")
    betas = list(config["betas"])
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas must be two numbers in [0, 1), got {betas}.")
    if config["name"] == "muon" and not 0 <= config["momentum"] < 1:
        raise ValueError(f"optimizer.momentum must be in [0, 1), got {config['momentum']}.")


def build_optimizer(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser that `config` names.

    Args:
        model: whose parameters it trains; weight decay acts on matrices alone.
        config: {"name": "adamw" or "muon", "lr", "betas": [b1, b2], "eps", "weight_decay"}; of muon also "momentum".
            "lr_scale" multiplies lr by kind of parameter, see `lkda.training.parameters`; 1 for each kind that it does
            not name.
    Raises:
        ValueError: as `check_optimizer`.
    """
    check_optimizer(config)
    if config["name"] == "muon":
        return muon(model, config)
    groups = parameter_groups(
        model, lr=config["lr"], lr_scale=config.get("lr_scale", {}), weight_decay=config["weight_decay"]
    )
    # One fused pass over each group: on small models the optimiser is otherwise a visible part of a step.
    return torch.optim.AdamW(groups, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"], fused=True)


def check_schedule(config: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown schedule, or a number out of its range."""
    if config["name"] not in SCHEDULES:
        raise ValueError(f"scheduler.name must be one of {', '.join(SCHEDULES)}, got {config['name']!r}.")
    if config["warmup_steps"] < 0:
        raise ValueError(f"scheduler.warmup_steps must be 0 or more, got {config['warmup_steps']}.")
    if not 0 <= config["final"] <= 1:
        raise ValueError(f"scheduler.final must be in [0, 1], got {config['final']}.")
    if config["name"] == "wsd" and not 0 < config["decay"] <= 1:
        raise ValueError(f"scheduler.decay must be in (0, 1], got {config['decay']}.")


def learning_rate_factor(config: Mapping[str, Any], *, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at `step`, in [0, 1].

    A linear warm-up from 1 / warmup_steps, then
        constant   1
        cosine     half a cosine from 1 to `final`
        wsd        1, and in the last `decay` part of the steps a straight line from 1 to `final`
                   (warm-up, stable, decay; arXiv:2404.06395)

    Args:
        config: {"name", "warmup_steps", "final", "decay"}, valid; `decay`, a part of the steps, is read by wsd alone.
    """
    name, warmup, final = config["name"], config["warmup_steps"], config["final"]
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    remaining = (total_steps - step) / max(1.0, config["decay"] * total_steps)
    return final + (1 - final) * max(0.0, min(1.0, remaining))
