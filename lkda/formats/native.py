"""The format `lkda`: model.safetensors, config.json (the plain dict of `build_model`), tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.formats.common.building import build_with_weights
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.reading import read_tokenizer, read_weights
from lkda.formats.common.writing import DTYPES, weights_of, write_json, write_tokenizer_json, write_weights
from lkda.models.lm import LanguageModel
from lkda.old_names import current_model_config

__all__ = ["DTYPES", "MODEL_TYPES", "load", "save", "unsupported_feature", "usage"]

MODEL_TYPES = ("lkda",)
FORMAT = 1


def unsupported_feature(config: Mapping[str, Any]) -> str | None:
    """None: this format expresses every model."""
    return None


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer, *, dtype: str) -> None:
    """Writes the three files, without the backend, which belongs to the machine and not to the model.

    Where options of a mixer are given, all of them are written: `load` takes a missing one for an older version's.
    """
    config = {key: value for key, value in model.config.items() if key != "backend"}
    config["mixer"] = dict(config["mixer"])
    for name in dict.fromkeys(layer_names(config)):
        if config["mixer"].get(name):
            options = options_of(config, name).items()
            config["mixer"][name] = {key: value for key, value in options if key != "backend"}
    weights = weights_of(model)
    if config["tie_embeddings"]:
        del weights["lm_head.weight"]  # the same tensor as embed_tokens.weight; safetensors stores no aliases
    write_weights(directory, weights, dtype=dtype)
    write_json(
        directory / "config.json", {"model_type": MODEL_TYPES[0], "format": FORMAT, "dtype": dtype, "model": config}
    )
    write_tokenizer_json(directory, tokenizer)


def load(config: Mapping[str, Any], directory: Path, *, backend: str) -> tuple[LanguageModel, Tokenizer]:
    """Reads what `save` wrote. Raises ValueError where it has another version or its files do not fit together."""
    if config.get("format") != FORMAT or not isinstance(config.get("model"), dict):
        raise InputError(f"{directory / 'config.json'} does not say format {FORMAT} and hold a model.")
    weights = read_weights(directory)
    made = current_model_config(config["model"])
    if config["model"].get("tie_embeddings", True) and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model = build_with_weights(made, weights, source=directory, backend=backend)
    return model, read_tokenizer(directory)


def usage(directory: str, *, dtype: str) -> str:
    """Python code that loads the model, whose weights were written in `dtype`."""
    return f"import lkda\n\nmodel, tokenizer = lkda.load({directory!r})  # model(tokens [B, T]) -> logits [B, T, vocab]"
