"""Starts a run from the weights of an exported directory instead of random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lkda
from lkda.checks import InputError
from lkda.commands.command_line.invocation import command, typed_overrides
from lkda.commands.command_line.overrides import override
from lkda.formats.common.layers import layer_names, options_of
from lkda.formats.common.reading import read_config
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel

# Options that the exported directory decides, by the first part of their names.
_BROUGHT = ("model", "mixer", "data.tokenizer_path", "data.vocab_size")
# Options of the group model that do not change the model.
_HARMLESS = ("model.name", "model.learning_rate")


def check_exported(directory: Path) -> None:
    """Raise InputError unless the option `init_from` is an exported directory that has all files. None is read but its
    config.json."""
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").exists():
        raise InputError(
            f"init_from needs an exported directory, but {directory} is a run directory: export it first with "
            f"{command('export', override('ckpt', str(directory)), 'out=exported/one')}"
        )
    try:
        read_config(directory)
    except InputError as error:
        raise InputError(f"init_from: {error}") from error


def load_initial_model(
    directory: Path, *, backend: str, data: Mapping[str, Any], rope_base: float | None = None
) -> LanguageModel:
    """Load the model of `directory`, in training mode.

    Args:
        directory: an exported directory, the option `init_from`, after `check_exported`.
        backend: of the operators.
        data: the resolved group, which must be text.
        rope_base: of the rotary positions; None for the model's own.
    Raises: InputError if the directory is not a usable exported directory, or if the command line also sets options of
        the model, or a rope_base for a model without rotary positions.
    """
    names = {word: word.lstrip("+~").split("=")[0] for word in typed_overrides()}
    clashing = [word for word, name in names.items() if name.startswith(_BROUGHT) and name not in _HARMLESS]
    if clashing:
        raise InputError(f"init_from has a model and a tokenizer of its own: leave out {' '.join(clashing)}.")
    if "tokenizer_path" not in data:
        raise InputError("init_from needs data of text, because its model was trained on text: give data=files, say.")
    model, _ = lkda.load(directory, backend=backend)
    if rope_base is not None:
        model = with_rope_base(model, rope_base)
    return model.train()


def with_rope_base(model: LanguageModel, base: float) -> LanguageModel:
    """The model with another base in all layers that have rotary positions. Weights do not depend on it.

    A model without such layers is returned as it is, because an experiment may set the base for all mixers.

    Args:
        base: of the rotary frequencies, above 0.

    Raises: InputError if there are none and the command line sets the base.
    """
    kinds = [
        name for name in dict.fromkeys(layer_names(model.config)) if options_of(model.config, name).get("rope_base")
    ]
    if not kinds:
        if any(word.lstrip("+").startswith("rope_base=") for word in typed_overrides()):
            raise InputError("rope_base has no effect: the model of init_from has no rotary positions. Leave it out.")
        return model
    mixer = dict(model.config["mixer"])
    for name in kinds:
        mixer[name] = {**(mixer.get(name) or {}), "rope_base": float(base)}
    changed = build_model({**model.config, "mixer": mixer})
    changed.load_state_dict(model.state_dict())
    return changed


def mixer_name(model: LanguageModel) -> str:
    """The name of the model's mixer. If its config has none, the kinds of its layers, such as kda_mla."""
    mixer = model.config["mixer"]
    return str(mixer.get("name") or "_".join(dict.fromkeys(mixer["pattern"])))
