"""Parameter groups: the learning rate and the weight decay of each kind of parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

KINDS = ("matrix", "embedding", "head", "vector")


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a model by kind. Each parameter appears once.

    matrix      weights of linear layers, except the head
    embedding   the token embedding, also if the head shares its weight
    head        the output layer `lm_head`, if it has a weight of its own
    vector      everything else: norms, convolutions, A_log, dt_bias and other biases
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in KINDS}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            kind = "embedding"
        elif head is not None and parameter is head.weight:
            kind = "head"
        else:
            kind = "matrix" if id(parameter) in linear else "vector"
        kinds[kind].append(parameter)
    return kinds


def parameter_groups(
    model: nn.Module, *, lr: float, lr_scale: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """An optimizer group for each kind of parameter that the model has, matrices first.

    Weight decay acts on matrices and on a head with a weight of its own. Vectors and embeddings, also an embedding that
    is shared with the head, have none.

    Args:
        lr: the peak learning rate.
        lr_scale: the factor on `lr`, by kind.
    """
    return [
        {
            "kind": kind,
            "params": parameters,
            "lr": lr * lr_scale[kind],
            "lr_scale": lr_scale[kind],
            "weight_decay": weight_decay if kind in ("matrix", "head") else 0.0,
        }
        for kind, parameters in parameters_by_kind(model).items()
        if parameters
    ]
