"""The peak learning rate of a run whose `optimizer.lr` is null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkda.checks import InputError


def measured_learning_rate(model: Mapping[str, Any], mixer: Mapping[str, Any]) -> float:
    """The rate that the model's YAML gives for every mixer, as `learning_rate`; else the one that was measured for this
    mixer at this size: the entry of the mixer's table `learning_rate` under the model's name.

    Args:
        model, mixer: the resolved groups.
    Raises: ValueError where neither has one, saying what to give.
    """
    if model.get("learning_rate") is not None:
        return model["learning_rate"]
    table = mixer.get("learning_rate") or {}
    if not isinstance(table, Mapping):
        raise InputError(
            f"mixer.learning_rate must be a rate for each name of a model, got {table!r}; "
            "the rate of a run is optimizer.lr."
        )
    if model.get("name") not in table:
        known = f", only for {', '.join(map(str, table))}" if table else ""
        raise InputError(
            f"no learning rate is known for mixer={mixer.get('name')} in a model named {model.get('name')}{known}: "
            "give optimizer.lr=..."
        )
    return table[model["name"]]
