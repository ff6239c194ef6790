"""How weights begin. Every module draws its own when it is built, and again in `reset_parameters`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Standard deviation of the entries of matrices and of embeddings.
STD = 0.02


class Linear(nn.Linear):
    """y = W x, no bias; W is N(0, STD)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)


class Embedding(nn.Embedding):
    """A vector for each token, N(0, STD)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=STD)


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
