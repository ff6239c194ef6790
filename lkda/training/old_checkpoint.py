"""Converts optimizer states from checkpoints of earlier versions to today's parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from lkda.training.parameters import parameters_by_kind


def current_optimizer_state(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """An optimizer's state_dict with one group for each kind of parameter.

    Before there were learning rates by kind, AdamW had two groups: matrices with the head, and everything else. Muon
    had a group of matrices, a group of the head if it has a weight of its own, and a group of everything else.

    Args:
        saved: the state_dict, in the old or the new form.
        model: the model that the optimizer trains.
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
