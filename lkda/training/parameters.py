"""Parameter groups: which learning rate and which weight decay a parameter has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

KINDS = ("matrix", "embedding", "head", "vector")


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of a model, each once:

    matrix      weights of linear layers, but for the head
    embedding   the token embedding, also where the head shares it
    head        the output layer `lm_head`, where it has a weight of its own
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
    """An optimiser group for each kind of parameter that the model has, matrices first. Weight decay acts on matrices
    and on a head of its own; embeddings (also where the head shares their table) and vectors have none.

    Args:
        lr: the peak learning rate.
        lr_scale: what it is multiplied by, by kind.
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
