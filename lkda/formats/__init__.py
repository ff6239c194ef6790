"""Reading and writing directories that other tools, or this one, load models from. A format is a module of this package
with `save(directory, model, tokenizer)`; its name is the module's (`lkda` itself is the module `native`)."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from tokenizers import Tokenizer

from lkda.formats.native import load
from lkda.models.lm import LanguageModel

__all__ = ["find_format", "load", "names", "save"]


def names() -> list[str]:
    """The formats there are."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return ["lkda" if name == "native" else name for name in modules]


def find_format(name: str) -> ModuleType:
    """The module of format `name`. Raises ValueError listing those that there are."""
    if name not in names():
        raise ValueError(f"format must be one of {', '.join(names())}, got {name!r}.")
    return importlib.import_module(f"{__name__}.{'native' if name == 'lkda' else name}")


def save(directory: str | Path, model: LanguageModel, tokenizer: Tokenizer, *, format: str = "lkda") -> None:
    """Write `model` and `tokenizer` into `directory`, which must be new or empty.

    Raises:
        ValueError: an unknown format, a directory that holds something or cannot be written, or a model that the
            format cannot express.
    """
    module = find_format(format)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        occupied = any(directory.iterdir())
    except OSError as error:
        raise ValueError(f"cannot write the directory {directory}: {error.strerror}.") from error
    if occupied:
        raise ValueError(f"the directory {directory} is not empty. Choose another, or empty it.")
    module.save(directory, model, tokenizer)
