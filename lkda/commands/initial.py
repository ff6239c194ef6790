"""Starting a run from an exported directory instead of fresh weights."""

from __future__ import annotations

import copy
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

import lkda
from lkda.checks import InputError
from lkda.commands.invocation import command
from lkda.commands.overrides import override
from lkda.models.lm import LanguageModel

# What the directory decides, by the beginning of an override.
_BROUGHT = ("model", "mixer", "data.tokenizer_path", "data.vocab_size")
# Entries of the group `model` that do not shape it.
_KEPT = ("name", "learning_rate")
_NOT_OF_THE_GROUP = ("mixer", "backend", "context")


def with_initial_model(config: DictConfig) -> tuple[DictConfig, LanguageModel | None]:
    """The configuration with the model, mixer and tokenizer of `init_from`, and that model; as it is where it is null.

    Raises:
        ValueError: `init_from` is no usable exported directory, or the command line asks for another model besides.
    """
    if config.init_from is None:
        return config, None
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    clashing = [word for word in given if word.lstrip("+~").split("=")[0].startswith(_BROUGHT) and not _harmless(word)]
    if clashing:
        raise InputError(f"init_from brings its own model and tokenizer: leave out {' '.join(clashing)}.")
    if "tokenizer_path" not in config.data:
        raise InputError("init_from brings a model of text and its tokenizer: give data of text, as data=files.")
    directory = Path(config.init_from).absolute()
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").exists():
        raise InputError(
            f"init_from takes an exported directory, and {directory} is a run: export it first, "
            f"{command('export', override('ckpt', str(config.init_from)), 'out=...')}"
        )
    model, _ = lkda.load(directory, backend=config.backend)
    own = {key: value for key, value in model.config.items() if key not in _NOT_OF_THE_GROUP}
    changed = copy.deepcopy(config)
    with open_dict(changed):
        kept = {key: config.model[key] for key in _KEPT}
        changed.model = {**kept, **own, "num_heads": model.config["mixer"]["num_heads"]}
        changed.mixer = {"name": "_".join(dict.fromkeys(model.config["mixer"]["pattern"])), **model.config["mixer"]}
        changed.data.tokenizer_path = str(directory / "tokenizer.json")
    OmegaConf.set_struct(changed, True)
    return changed, model


def _harmless(override: str) -> bool:
    return override.split("=")[0] in {f"model.{key}" for key in _KEPT}
