"""The sequence mixers, one per module. A mixer has the name of its module; a new module adds a mixer."""

from __future__ import annotations

import importlib
import pkgutil

from lkda.checks import InputError
from lkda.models.mixer import Mixer


def mixer_names() -> list[str]:
    """The names of all mixers, in alphabetical order."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_mixer(name: str) -> type[Mixer]:
    """The mixer class in the module `name` of this package.

    Raises: ValueError, listing the mixers, for an unknown name.
    """
    if name not in mixer_names():
        raise InputError(f"unknown mixer {name!r}; there are {', '.join(mixer_names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Mixer) and value.__module__ == module.__name__:
            return value
    raise InputError(f"{module.__name__} defines no subclass of lkda.models.mixer.Mixer.")
