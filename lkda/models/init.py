"""How weights begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def reset_children(module: nn.Module) -> None:
    """Draw the weights of every module inside `module` anew, also where `to_empty` has left them without values."""
    for child in module.children():
        child.reset_parameters()  # type: ignore[operator]


def log_uniform_(x: Tensor, *, low: float, high: float) -> Tensor:
    """Fill x with exp(U(log low, log high))."""
    return x.uniform_(math.log(low), math.log(high)).exp_()


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))
