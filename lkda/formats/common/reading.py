"""Reads directories from untrusted sources: only JSON and safetensors, so nothing in them is executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from lkda.checks import InputError, check_count
from lkda.records import read_record
from lkda.tokenizer_loading import tokenizer_from_file

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
# Reading a pickle can run code.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json, after checking that the other files exist.

    Raises: ValueError naming the file that is missing or broken.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(without_config(directory))
    config = _read_json(path)
    if not any((directory / name).is_file() for name in (WEIGHTS, SHARDS)):
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{directory} holds its weights as a pickle ({pickles[0]}), which runs code when it is read; "
                f"lkda reads only {WEIGHTS}: convert it where you trust it."
            )
        raise InputError(f"{directory} is no exported model: it has no {WEIGHTS}.")
    if not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory} is no exported model: it has no tokenizer.json.")
    return config


def without_config(directory: Path) -> str:
    """The message for a path that was given as an exported directory, and has no config.json."""
    advice = "give a directory that scripts/export.py has written with format=lkda or format=hf."
    if not directory.exists():
        return f"{directory} does not exist: {advice}"
    if not directory.is_dir():
        return f"{directory} is a file: {advice}"
    if any(directory.glob("*.gguf")):
        return (
            f"{directory} holds a GGUF file, which is for llama.cpp and cannot be loaded by lkda: export the model "
            "with format=lkda or format=hf."
        )
    return f"{directory} is no exported model: it has no config.json. Instead, {advice}"


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists, on the CPU.

    Raises: ValueError naming the file that is missing or broken.
    """
    if (directory / WEIGHTS).is_file():
        return _read_safetensors(directory / WEIGHTS)
    shards = _read_json(directory / SHARDS).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names:
        raise InputError(f"{directory / SHARDS} lists no shards: it lacks the entry weight_map.")
    weights: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise InputError(f"{directory} is incomplete: {SHARDS} lists {name!r}, which is not there.")
        weights |= _read_safetensors(directory / name)
    return weights


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of tokenizer.json, without special tokens around a text, truncation and padding."""
    tokenizer = tokenizer_from_file(directory / "tokenizer.json")
    tokenizer.post_processor = None
    return tokenizer


def number(config: Mapping[str, Any], key: str, *, least: int = 0, source: object) -> int:
    """A whole number of config.json. Raises ValueError, naming the key, its value and `source`, where it is not one."""
    check_count(f"config.json of {source}: {key}", config.get(key), least=least)
    value: int = config[key]
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_record(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected an object.")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or no safetensors file: {error}.") from error
