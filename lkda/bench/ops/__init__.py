"""One module an operator: what it is fed, what it must move, who competes. A new one is found by its name."""

from __future__ import annotations

import importlib
import pkgutil

from lkda.bench.contest import Contest
from lkda.checks import InputError


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Contest:
    """The contest of an operator. Raises ValueError, with those there are, for one that has none."""
    if name not in names():
        raise InputError(f"ops={name}: there is no such benchmark; there are {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").CONTEST
