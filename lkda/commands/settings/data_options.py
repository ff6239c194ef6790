"""The group `data`: checks its options against the data module that it names, and builds that module."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class

from lkda.checks import InputError, check_types
from lkda.commands.settings.unused_options import DATA, check_unused
from lkda.data.datamodule import IndexedDataModule


def check_data_options(data: Mapping[str, Any]) -> None:
    """Raise InputError if an option is unknown to the chosen data module, is missing, or has a value of a wrong type.

    Args:
        data: the resolved group, with its `_target_`.
    """
    target = data.get("_target_")
    try:
        module = get_class(target)  # type: ignore[arg-type]
    except Exception as error:  # of many types: the import itself may fail
        raise InputError(f"data._target_={target} is not a class that can be imported: {error}.") from error
    options, known = _options(data), inspect.signature(module).parameters
    name = str(target).rsplit(".", 1)[-1]
    extra = [option for option in options if option not in known]
    if extra:
        raise InputError(
            f"data.{extra[0]} is not an option of {name}, which takes {', '.join(known)}; "
            f"leave it out, or choose the data= that has it."
        )
    missing = [option for option, of in known.items() if of.default is of.empty and option not in options]
    if missing:
        raise InputError(f"data.{missing[0]} is missing, which {name} needs: choose the data= that has it.")
    check_types(module, options, prefix="data.")
    check_unused(DATA, {"data": data})


def build_data(data: Mapping[str, Any]) -> IndexedDataModule:
    """Build the data module from checked options. It is not prepared yet."""
    module: IndexedDataModule = get_class(data["_target_"])(**_options(data))
    return module


def _options(data: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in data.items() if name != "_target_"}
