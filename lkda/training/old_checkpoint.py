"""Optimiser states of checkpoints that were written before an option existed, in today's order."""

from __future__ import annotations

from typing import Any

from torch import nn

from lkda.training.parameters import parameters_by_kind


def current_optimizer_state(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An optimiser's state_dict with a group for each kind of parameter.

    Before there were learning rates by kind, AdamW had two groups, of matrices and the head, and of everything else;
    Muon had its matrices, then the head where it has a weight of its own, then the rest.

    Args:
        saved: the state_dict, of either time.
        model: that it trains.
    """
    if all("kind" in group for group in saved["param_groups"]):
        return saved
    kinds = parameters_by_kind(model)
    names = {id(parameter): number for number, parameter in enumerate(model.parameters())}

    def in_order(*chosen: str) -> list[nn.Parameter]:
        return sorted((p for kind in chosen for p in kinds[kind]), key=lambda p: names[id(p)])

    muon = "momentum" in saved["param_groups"][0]
    old_kinds = (
        [["matrix"], ["head"], ["embedding", "vector"]] if muon else [["matrix", "head"], ["embedding", "vector"]]
    )
    place: dict[int, int] = {}
    group_of: dict[str, dict[str, Any]] = {}
    groups = iter(saved["param_groups"])
    for chosen in old_kinds:
        parameters = in_order(*chosen)
        if parameters:
            group = next(groups)
            place |= {id(parameter): index for parameter, index in zip(parameters, group["params"], strict=True)}
            group_of |= dict.fromkeys(chosen, group)
    state, made, count = {}, [], 0
    for kind, parameters in kinds.items():
        if not parameters:
            continue
        numbers = list(range(count, count + len(parameters)))
        count += len(parameters)
        made.append({**group_of[kind], "kind": kind, "lr_scale": 1.0, "params": numbers})
        for number, parameter in zip(numbers, parameters):
            if place[id(parameter)] in saved["state"]:
                state[number] = saved["state"][place[id(parameter)]]
    return {"state": state, "param_groups": made}
