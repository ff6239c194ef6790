"""The peak learning rate of a run whose `optimizer.lr` is null."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lkda.checks import InputError


def measured_learning_rate(model: Mapping[str, Any], mixer: Mapping[str, Any]) -> float:
    """The peak learning rate of a mixer in a model.

    It is `model.learning_rate` if that is set, which holds for every mixer. Otherwise it is the rate that was measured
    for this mixer at this size: the entry of the table `mixer.learning_rate` under the model's name.

    Args:
        model, mixer: the resolved groups.
    Raises: InputError if neither group has a rate. The message says what to give.
    """
    if model.get("learning_rate") is not None:
        return model["learning_rate"]
    table = mixer.get("learning_rate") or {}
    if not isinstance(table, Mapping):
        raise InputError(
            f"mixer.learning_rate must be a table of rates by the name of the model, got {table!r}; "
            "set the rate of a run with optimizer.lr."
        )
    if model.get("name") not in table:
        known = f", only for {', '.join(map(str, table))}" if table else ""
        raise InputError(
            f"no learning rate is known for mixer={mixer.get('name')} in a model named {model.get('name')}{known}: "
            "give optimizer.lr=..."
        )
    return table[model["name"]]
