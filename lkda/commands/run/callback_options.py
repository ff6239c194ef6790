"""The group `callbacks`: its checks, and the accuracy at which a run ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from hydra.utils import instantiate

from lkda.checks import InputError, check_types
from lkda.commands.settings.targets import check_arguments, located
from lkda.training.callbacks import StopWhenLearnt
from lkda.training.options import check_parts


def check_callbacks(callbacks: Any) -> None:
    """Raise InputError for an entry that is not a callback, or has options that its class does not take."""
    check_parts("callbacks", callbacks, kind="callback", advice=_how_to_add)
    for name, options in callbacks.items():
        if options:
            _check(f"callbacks.{name}", options)
    stop_accuracy(callbacks)


def _how_to_add(name: str) -> str:
    if name in ("", "overview", "progress"):
        return "choose callbacks=default first"
    return f"add +callbacks.{name}._target_=CLASS, for example lkda.training.callbacks.{StopWhenLearnt.__name__}"


def _check(entry: str, options: Mapping[str, Any]) -> None:
    target = options["_target_"]
    found = located(entry, target)
    if isinstance(found, type) and not issubclass(found, L.Callback):
        raise InputError(f"{entry}._target_={target} makes a {found.__name__}, which is not a Lightning callback.")
    check_arguments(found, entry, options)
    if found.__module__.startswith("lkda."):
        check_types(found, options, prefix=f"{entry}.")


def stop_accuracy(callbacks: Mapping[str, Any]) -> tuple[str, float] | None:
    """The option that ends the run at an accuracy, and its value: ("callbacks.learnt.accuracy", 0.99). Of several, that
    with the lowest value. None if there is no such option.

    Args:
        callbacks: the group, whose entries name their classes.
    Raises: InputError if a value is outside its range.
    """
    found = {}
    for name, options in callbacks.items():
        target = located(f"callbacks.{name}", options["_target_"]) if options else None
        if isinstance(target, type) and issubclass(target, StopWhenLearnt):
            found[f"callbacks.{name}.accuracy"] = float(instantiate(options).accuracy)
    return min(found.items(), key=lambda item: item[1], default=None)
