"""The initialisation of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lkda.checks import InputError

if TYPE_CHECKING:
    from lkda.models.lm import LanguageModel


def reset_children(module: nn.Module) -> None:
    """Initialises the weights of every module inside `module`, also after `to_empty` has left them without values."""
    for child in module.children():
        child.reset_parameters()  # type: ignore[operator]


STD = 0.02
OUTPUTS = ("normal", "depth", "zero")


@dataclass(frozen=True)
class Initialization:
    """The initialisation of a language model. N(0, s) is a normal distribution of standard deviation s.

    Attributes:
        embedding_std: of the token embedding.
        head_std: of an untied output layer; 0 for zeros. A tied output layer is the embedding.
        outputs: of the layers that write into the residual stream (o_proj, down_proj): "normal" for N(0, 0.02); "depth"
            for N(0, 0.02 / sqrt(2 layers)), as in GPT-2; "zero".
    """

    embedding_std: float = STD
    head_std: float = STD
    outputs: str = "normal"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Initialization:
        """From the dict `model.init`. Raises ValueError for an unknown key or an impossible value."""
        known = [field.name for field in fields(cls)]
        if not isinstance(config, Mapping):
            raise InputError(f"model.init must hold {', '.join(known)}, got {config!r}.")
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise InputError(f"model.init has no {', '.join(unknown)}; it has {', '.join(known)}.")
        made = cls(**config)
        if made.outputs not in OUTPUTS:
            raise InputError(f"model.init.outputs must be one of {', '.join(OUTPUTS)}, got {made.outputs!r}.")
        for name in ("embedding_std", "head_std"):
            value = getattr(made, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise InputError(f"model.init.{name} must be a number of 0 or more, got {value!r}.")
        return made


@torch.no_grad()
def apply_initialization(model: LanguageModel, config: Mapping[str, Any]) -> None:
    """Changes weights that have the default initialisation, N(0, 0.02), to the one that `config` describes."""
    chosen = Initialization.of(config)
    model.embed_tokens.weight.mul_(chosen.embedding_std / STD)
    if model.lm_head.weight is not model.embed_tokens.weight:
        model.lm_head.weight.mul_(chosen.head_std / STD)
    factor = {"normal": 1.0, "depth": (2 * len(model.blocks)) ** -0.5, "zero": 0.0}[chosen.outputs]
    for name, weight in model.named_parameters():
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            weight.mul_(factor)


def log_uniform_(x: Tensor, *, low: float, high: float) -> Tensor:
    """Fills x with exp(U(log low, log high))."""
    return x.uniform_(math.log(low), math.log(high)).exp_()


def inverse_softplus(x: Tensor) -> Tensor:
    """The y for which softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))
