"""The `_target_` of an entry of the configuration: what it names, and whether the other options are arguments of it."""

from __future__ import annotations

import inspect
import pydoc
from collections.abc import Callable, Mapping
from typing import Any

from lkda.checks import InputError


def located(entry: str, target: Any) -> Callable[..., Any]:
    """The class or function that `target` names. Raises InputError if there is none.

    Args:
        entry: the dotted name of the entry, such as "callbacks.progress".
    """
    try:
        found = pydoc.locate(str(target))
    except pydoc.ErrorDuringImport as error:
        text = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"{entry}._target_={target} cannot be imported: {text}.") from error
    if found is None:
        raise InputError(f"{entry}._target_={target} cannot be imported: there is no class or function of that name.")
    if not callable(found):
        raise InputError(f"{entry}._target_={target} is not a class or a function: give the name of one.")
    function: Callable[..., Any] = found
    return function


def check_arguments(
    function: Callable[..., Any], entry: str, options: Mapping[str, Any], *, partial: bool = False, choose: str = ""
) -> None:
    """Raise InputError for an option that is not an argument of `function`, and for a missing argument.

    Args:
        entry: the dotted name of the entry.
        options: of the entry. Those that begin with _ are Hydra's.
        partial: whether other arguments are given later.
        choose: for the message, what to choose to get the right options.
    """
    try:
        known = inspect.signature(function).parameters
    except ValueError:  # of some functions that are written in C
        return
    name, given = function.__name__, [option for option in options if not option.startswith("_")]
    extra = [option for option in given if option not in known]
    if extra and not any(argument.kind is argument.VAR_KEYWORD for argument in known.values()):
        raise InputError(
            f"{entry}.{extra[0]} is not an option of {name}, which takes {', '.join(known) or 'none'}; "
            f"leave it out{', or ' * bool(choose)}{choose}."
        )
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [option for option, of in known.items() if of.default is of.empty and of.kind not in several]
    missing = [option for option in needed if option not in given]
    if missing and not partial and "_args_" not in options:
        what_to_do = choose or f"add +{entry}.{missing[0]}=VALUE"
        raise InputError(f"{entry}.{missing[0]} is missing, which {name} needs: {what_to_do}.")
