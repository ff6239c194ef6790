"""The format `lkda`: model.safetensors, config.json (the plain dict of `build_model`), tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor

from lkda.models.build import build_model
from lkda.models.lm import LanguageModel

MODEL_TYPE = "lkda"
FORMAT = 1


def save(directory: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write the three files. The backend is left out: it belongs to the machine, not to the model."""
    config = {key: value for key, value in model.config.items() if key != "backend"}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_embeddings"]:
        del weights["lm_head.weight"]  # another name of embed_tokens.weight, and safetensors stores no aliases
    # Written here rather than by safetensors, whose files only their owner can read.
    (directory / "model.safetensors").write_bytes(serialize(weights))
    text = json.dumps({"model_type": MODEL_TYPE, "format": FORMAT, "model": config}, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))


def load(directory: str | Path, *, backend: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """Read what `save` wrote.

    Args:
        directory: an exported directory.
        backend: of the ops: auto, cuda, chunk, recurrent.
    Returns: the model, on the CPU and in eval mode, and its tokenizer.
    Raises:
        ValueError: a file is missing or broken, the directory is of another kind, or the tensors do not fit.
    """
    directory = Path(directory)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} is no exported model: it has no {name}.")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'} is not JSON: {error}.") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE or config.get("format") != FORMAT:
        raise ValueError(f"{directory / 'config.json'} does not say model_type {MODEL_TYPE!r} and format {FORMAT}.")
    try:
        weights = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{directory / 'model.safetensors'} is truncated or no safetensors file: {error}.") from error
    if config["model"].get("tie_embeddings") and "embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    model = build_with_weights(config["model"], weights, source=directory, backend=backend)
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{directory / 'tokenizer.json'} is not a tokenizer ({error}).") from error
    return model, tokenizer


def build_with_weights(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], *, source: str | Path, backend: str = "auto"
) -> LanguageModel:
    """The model of `config` with `weights`, on the CPU and in eval mode.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; names the first one, and `source`.
    """
    model = build_model({**config, "backend": backend})
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = tuple(own[name].shape) if name in own else "unknown"
        if there != here:
            raise ValueError(f"{source} holds the weights of another model: {name} is {there}, expected {here}.")
    model.load_state_dict(dict(weights))
    return model.eval()
