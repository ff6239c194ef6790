"""Reading and writing directories that other tools, or this one, load models from.

A format is a module of this package; its name is the module's (`lkda` itself is the module `native`). It has
    DTYPES                                    how weights can be written, the default first
    obstacle(config) -> str | None            what of a model's config it cannot express, in a few words
    save(directory, model, tokenizer, *, dtype)
    usage(directory) -> str                   how to load it, for the model card
    MODEL_TYPES                               of config.json, that it reads, through
    load(config, directory, *, backend) -> (model, tokenizer)
What several share is in `lkda.formats.common`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.formats.common.card import model_card, recorded_config
from lkda.formats.common.embedding import FOLDED
from lkda.formats.common.reading import read_config
from lkda.io import named
from lkda.models.lm import LanguageModel

__all__ = ["check_export", "find_format", "has_folded_embedding", "load", "names", "recorded_config", "save"]


def names() -> list[str]:
    """The formats there are."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return ["lkda" if name == "native" else name for name in modules]


def find_format(name: str) -> ModuleType:
    """The module of format `name`. Raises ValueError listing those that there are."""
    if name not in names():
        raise InputError(f"format must be one of {', '.join(names())}, got {name!r}.")
    return importlib.import_module(f"{__name__}.{'native' if name == 'lkda' else name}")


def check_export(config: Mapping[str, Any], *, format: str, dtype: str | None) -> str:
    """The dtype that weights will have in `format`.

    Args:
        config: of the model, as `LanguageModel.config`.
        format: one of `names()`.
        dtype: one of the format's, or None for its default.
    Raises:
        ValueError: an unknown format or dtype, or a model that the format cannot express; names the formats that can.
    """
    module = find_format(format)
    if dtype is not None and dtype not in module.DTYPES:
        raise InputError(f"dtype must be one of {', '.join(module.DTYPES)} in format {format}, got {dtype!r}.")
    obstacle = module.obstacle(config)
    if obstacle is not None:
        able = [name for name in names() if find_format(name).obstacle(config) is None]
        raise InputError(f"format {format} cannot express {obstacle}; {' and '.join(able)} can.")
    return dtype or module.DTYPES[0]


def save(
    directory: str | Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    format: str = "lkda",
    dtype: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write `model`, `tokenizer` and a model card into `directory`, which must be new or empty.

    All of it appears at once, or nothing does.

    Args:
        format: one of `names()`.
        dtype: of the weights, one of the format's; its first where None.
        run: what the card tells of the training, {"training": {name: value}, "results": {name: value}, "config": dict}.
    Raises:
        ValueError: as `check_export`, or a directory that holds something or cannot be written.
    """
    dtype = check_export(model.config, format=format, dtype=dtype)
    module = find_format(format)
    directory = Path(directory).absolute()
    if directory.is_symlink():  # what it points to is written, and the link stays
        directory = directory.resolve()
    try:
        if _occupied(directory):
            raise InputError(f"the directory {directory} is not empty. Choose another, or empty it.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    except OSError as error:
        raise InputError(f"cannot write the directory {directory}: {error.strerror}.") from error
    try:
        module.save(unfinished, model, tokenizer, dtype=dtype)
        card = model_card(directory.name, model, usage=module.usage(directory.name), dtype=dtype, run=run or {})
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes it private
        os.replace(unfinished, directory)  # over an empty directory, if one is there
    except OSError as error:
        raise named(error, directory) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _occupied(directory: Path) -> bool:
    try:
        return any(directory.iterdir())
    except FileNotFoundError:
        return False


def has_folded_embedding(directory: str | Path) -> bool:
    """Whether the model in `directory` lost the norm or scale of its embedding to its table when it was exported.

    Raises: ValueError as `load`.
    """
    return bool(read_config(Path(directory)).get(FOLDED))


def load(directory: str | Path, *, backend: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Read a directory of any format that can be read; config.json's model_type says which it is.

    JSON and safetensors alone are read, so nothing in the directory is executed.

    Args:
        backend: of the ops: auto, cuda, chunk, recurrent.
    Returns: the model, in float32, on the CPU and in eval mode, and its tokenizer.
    Raises:
        ValueError: a file is missing or broken, the model is of an unknown type, or the tensors do not fit.
    """
    directory = Path(directory)
    config = read_config(directory)
    readers = {word: module for module in map(find_format, names()) for word in module.MODEL_TYPES}
    word = config.get("model_type")
    if word not in readers:
        raise InputError(f"{directory / 'config.json'} says model_type {word!r}; lkda reads {', '.join(readers)}.")
    return readers[word].load(config, directory, backend=backend)
