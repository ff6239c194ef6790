"""Reading and writing models as directories, for this package and for other tools.

Each format is a module of this package with the name of the format. (The module of the format `lkda` is `native`.)
A module defines
    DTYPES                                    the dtypes that weights can be written in, the default first
    unsupported_feature(config) -> str | None a feature of the model that the format lacks, in words
    save(directory, model, tokenizer, *, dtype)
    usage(directory, *, dtype) -> str         Python code that loads the model, for the model card
    MODEL_TYPES                               the model types of config.json that it can read, with
    load(config, directory, *, backend) -> (model, tokenizer)
`lkda.formats.common` holds what several formats use.
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

from lkda.checks import InputError, refusing_damage
from lkda.formats.common.card import model_card, recorded_config
from lkda.formats.common.embedding import FOLDED
from lkda.formats.common.reading import read_config
from lkda.io import named
from lkda.models.lm import LanguageModel

__all__ = ["check_export", "find_format", "has_folded_embedding", "load", "names", "recorded_config", "save"]


def names() -> list[str]:
    """The names of all formats."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return ["lkda" if name == "native" else name for name in modules]


def find_format(name: str) -> ModuleType:
    """The module of the format `name`. Raises ValueError, listing the formats, for an unknown name."""
    if name not in names():
        raise InputError(f"format must be one of {', '.join(names())}, got {name!r}.")
    return importlib.import_module(f"{__name__}.{'native' if name == 'lkda' else name}")


def check_export(config: Mapping[str, Any], *, format: str, dtype: str | None) -> str:
    """Checks that a model can be written in `format`, and returns the dtype that its weights will have.

    Args:
        config: `LanguageModel.config`.
        format: one of `names()`.
        dtype: one of the dtypes of the format, or None for its default.
    Raises:
        ValueError: the format or dtype is unknown, or the format cannot express the model (it names those that can).
    """
    module = find_format(format)
    if dtype is not None and dtype not in module.DTYPES:
        raise InputError(f"dtype must be one of {', '.join(module.DTYPES)} in format {format}, got {dtype!r}.")
    unsupported_feature = module.unsupported_feature(config)
    if unsupported_feature is not None:
        able = [name for name in names() if find_format(name).unsupported_feature(config) is None]
        raise InputError(f"format {format} cannot express {unsupported_feature}; {' and '.join(able)} can.")
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
    """Writes `model`, `tokenizer` and a model card into `directory`, which must be new or empty.

    The directory appears complete or not at all.

    Args:
        format: one of `names()`.
        dtype: of the weights, one of the format's; its default where None.
        run: what the card says of the training: {"training": {name: value}, "results": {name: value}, "config": dict}.
    Raises:
        ValueError: as for `check_export`, or the directory is not empty or cannot be written.
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
        card = model_card(
            directory.name, model, usage=module.usage(directory.name, dtype=dtype), dtype=dtype, run=run or {}
        )
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp makes it readable for its owner only
        os.replace(unfinished, directory)  # replaces an empty directory
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
    """Whether the norm and scale of the embedding were folded into its table when the model was exported.

    Raises: ValueError as for `load`.
    """
    return bool(read_config(Path(directory)).get(FOLDED))


def load(directory: str | Path, *, backend: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Reads a directory of any readable format. "model_type" in its config.json says which format it has.

    Only JSON and safetensors are read, so nothing in the directory is executed.

    Args:
        backend: of the ops: auto, cuda, cpu, chunk, recurrent.
    Returns: the model, in float32, on the CPU and in eval mode, and its tokenizer.
    Raises:
        ValueError: a file is missing or broken, the model type is unknown, or the tensors do not fit the config.
    """
    directory = Path(directory)
    config = read_config(directory)
    readers = {word: module for module in map(find_format, names()) for word in module.MODEL_TYPES}
    word = config.get("model_type")
    if not isinstance(word, str | None) or word not in readers:
        raise InputError(f"{directory / 'config.json'} says model_type {word!r}; lkda reads {', '.join(readers)}.")
    with refusing_damage(directory):
        return readers[word].load(config, directory, backend=backend)
