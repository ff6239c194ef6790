"""A run that begins with the model of an exported directory instead of fresh weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lkda
from lkda.checks import InputError
from lkda.commands.invocation import command, typed_overrides
from lkda.commands.overrides import override
from lkda.models.lm import LanguageModel

# What the directory decides, by the beginning of an override.
_BROUGHT = ("model", "mixer", "data.tokenizer_path", "data.vocab_size")
# Options of `model` that do not shape it.
_HARMLESS = ("model.name", "model.learning_rate")


def load_initial_model(directory: Path, *, backend: str, data: Mapping[str, Any]) -> LanguageModel:
    """The model of `directory`, to train on.

    Args:
        directory: an exported one, `init_from`.
        backend: of the ops.
        data: the resolved group, which must be text.
    Raises:
        ValueError: it is no usable exported directory, or the command line asks for another model besides.
    """
    names = {word: word.lstrip("+~").split("=")[0] for word in typed_overrides()}
    clashing = [word for word, name in names.items() if name.startswith(_BROUGHT) and name not in _HARMLESS]
    if clashing:
        raise InputError(f"init_from brings its own model and tokenizer: leave out {' '.join(clashing)}.")
    if "tokenizer_path" not in data:
        raise InputError("init_from brings a model of text and its tokenizer: give data of text, as data=files.")
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").exists():
        raise InputError(
            f"init_from takes an exported directory, and {directory} is a run: export it first, "
            f"{command('export', override('ckpt', str(directory)), 'out=...')}"
        )
    model, _ = lkda.load(directory, backend=backend)
    return model.train()


def mixer_name(model: LanguageModel) -> str:
    """What its mixer is called; where its config does not say, the kinds of its layers: kda_mla."""
    mixer = model.config["mixer"]
    return str(mixer.get("name") or "_".join(dict.fromkeys(mixer["pattern"])))
