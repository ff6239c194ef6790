"""Parameter groups: which parameters weight decay acts on."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimiser groups: the matrices of linear layers with `weight_decay`, everything else without: embeddings
    (also where the head shares their table), convolutions, norms, A_log, dt_bias and other biases.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed = matrices - tables
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
