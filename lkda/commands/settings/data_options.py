"""The group `data`: checks its options against the data module that it names, and builds that module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class

from lkda.checks import InputError, check_types
from lkda.commands.settings.targets import check_arguments, located
from lkda.commands.settings.unused_options import DATA, check_unused
from lkda.data.datamodule import IndexedDataModule


def check_data_options(data: Mapping[str, Any]) -> None:
    """Raise InputError if an option is unknown to the chosen data module, is missing, or has a value of a wrong type.

    Args:
        data: the resolved group, with its `_target_`.
    """
    target = data.get("_target_")
    module = located("data", target)
    if not (isinstance(module, type) and issubclass(module, IndexedDataModule)):
        raise InputError(
            f"data._target_={target} is not a data module of lkda: choose one of the data= that there are."
        )
    check_arguments(module, "data", data, choose="choose the data= that has it")
    check_types(module, _options(data), prefix="data.")
    check_unused(DATA, {"data": data})


def build_data(data: Mapping[str, Any]) -> IndexedDataModule:
    """Build the data module from checked options. It is not prepared yet."""
    module: IndexedDataModule = get_class(data["_target_"])(**_options(data))
    return module


def _options(data: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in data.items() if name != "_target_"}
