"""How weights begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lkda.models.short_conv import ShortConvolution


def init_weights(module: nn.Module) -> None:
    """Linear layers and embeddings N(0, 0.02); convolutions uniform within 1/sqrt(width), as nn.Conv1d draws them."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, ShortConvolution):
        bound = module.width**-0.5
        nn.init.uniform_(module.weight, -bound, bound)


def log_uniform(*shape: int, low: float, high: float) -> Tensor:
    """exp(U(log low, log high))"""
    return torch.exp(torch.empty(*shape).uniform_(math.log(low), math.log(high)))


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))
