"""From plain names and numbers to an optimiser and a learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lkda.training.parameters import parameter_groups

SCHEDULES = ("constant", "cosine", "wsd")


def build_optimizer(model: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser that `config` names.

    Args:
        model: whose parameters it trains; weight decay acts on matrices alone.
        config: {"name": "adamw", "lr", "betas": [b1, b2], "eps", "weight_decay"}.
    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if config["name"] != "adamw":
        raise ValueError(f"optimizer.name must be adamw, got {config['name']!r}.")
    if not config["lr"] > 0:
        raise ValueError(f"optimizer.lr must be greater than 0, got {config['lr']}.")
    if config["weight_decay"] < 0:
        raise ValueError(f"optimizer.weight_decay must be 0 or more, got {config['weight_decay']}.")
    groups = parameter_groups(model, weight_decay=config["weight_decay"])
    beta1, beta2 = config["betas"]
    # One fused pass over each group: on small models the optimiser is otherwise a visible part of a step.
    return torch.optim.AdamW(groups, lr=config["lr"], betas=(beta1, beta2), eps=config["eps"], fused=True)


def learning_rate_factor(config: Mapping[str, Any], *, step: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at `step`, in [0, 1].

    A linear warm-up from 1 / warmup_steps, then
        constant   1
        cosine     half a cosine from 1 to `final`
        wsd        1, and in the last `decay` part of the steps a straight line from 1 to `final`
                   (warm-up, stable, decay; arXiv:2404.06395)

    Args:
        config: {"name", "warmup_steps", "final", "decay"}; `decay`, a fraction of the steps, is read by wsd alone.
    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    name, warmup, final = config["name"], config["warmup_steps"], config["final"]
    if name not in SCHEDULES:
        raise ValueError(f"scheduler.name must be one of {', '.join(SCHEDULES)}, got {name!r}.")
    if warmup < 0 or not 0 <= final <= 1:
        raise ValueError(f"scheduler: warmup_steps must be >= 0 and final in [0, 1], got {warmup} and {final}.")
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    if name == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if not 0 < config["decay"] <= 1:
        raise ValueError(f"scheduler.decay must be in (0, 1], got {config['decay']}.")
    remaining = (total_steps - step) / max(1.0, config["decay"] * total_steps)
    return final + (1 - final) * max(0.0, min(1.0, remaining))
