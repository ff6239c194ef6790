"""What a configuration must satisfy before any time is spent on it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError, check_types
from lkda.models.build import build_model

# Options of data, and those that take their place.
_WITHOUT_EFFECT = {
    "val_fraction": ("val_paths", "val_from_year", "val_split"),
    "test_fraction": ("test_paths", "test_from_year", "test_split"),
    "vocab_size": ("tokenizer_path",),
}
# In the group `model` for other groups to refer to.
_NOT_THE_MODELS = ("name", "num_heads", "learning_rate")


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as a resolved plain dict. Raises ValueError naming a value that is required and missing."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} is required: give {missing[0]}=...")
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check_options(data: DictConfig) -> None:
    """Raise ValueError for an option that the chosen data does not have, or a value that is not of its kind."""
    try:
        target = get_class(data._target_)
    except Exception as error:  # of many types: the module, the class, or what importing it raises
        raise InputError(f"data._target_={data._target_} is no class that can be imported: {error}.") from error
    known = inspect.signature(target).parameters
    extra = [str(key) for key in data if key != "_target_" and key not in known]
    if extra:
        raise InputError(
            f"data.{extra[0]} is not an option of {data._target_.rsplit('.', 1)[-1]}, which takes {', '.join(known)}; "
            f"leave it out, or choose the data= that has it."
        )
    values = OmegaConf.to_container(data, resolve=True)
    assert isinstance(values, dict)
    check_types(target, {str(name): value for name, value in values.items()}, prefix="data.")
    _check_effects(values)


def _check_effects(data: dict[Any, Any]) -> None:
    """Raise InputError for an option of the command line that another one leaves without effect."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    for option, others in _WITHOUT_EFFECT.items():
        stronger = [other for other in others if data.get(other)]
        if stronger and any(word.lstrip("+").startswith(f"data.{option}=") for word in given):
            raise InputError(f"data.{option} has no effect beside data.{stronger[0]}: leave one of them out.")


def model_config(config: dict[str, Any], *, vocab_size: int, context: int) -> dict[str, Any]:
    """The plain dict of `build_model` from the groups model, mixer and backend.

    Args:
        config: the resolved configuration.
        vocab_size: of the tokenizer; the model has as many rows unless model.vocab_size asks for more.
        context: length trained at.
    Raises:
        ValueError: the tokenizer has more tokens than the model has rows, or the model cannot be built.
    """
    model = {key: value for key, value in config["model"].items() if key not in _NOT_THE_MODELS}
    rows = model["vocab_size"] or vocab_size
    if vocab_size > rows:
        raise InputError(
            f"the tokenizer has {vocab_size} tokens and the model {rows} rows: "
            f"set model.vocab_size to {vocab_size} or more, or data.vocab_size to {rows} or less."
        )
    return {**model, "vocab_size": rows, "context": context, "backend": config["backend"], "mixer": config["mixer"]}


def check_model(made: dict[str, Any], *, device: torch.device, precision: torch.dtype) -> dict[str, str]:
    """Build the model without memory, and resolve its backends on the device it will run on, as {"kda": "chunk"}.

    Raises:
        ValueError: it cannot be built, or a backend cannot run there.
    """
    try:
        with torch.device("meta"):
            return build_model(made).resolve_backends(device, precision)
    except (RuntimeError, OverflowError) as error:  # torch cannot count the bytes of a tensor
        raise InputError(f"the model is too large to be built ({str(error).splitlines()[0]}).") from error


def device_of(accelerator: str) -> torch.device:
    """The device that the word auto, cpu or gpu stands for. Raises ValueError where it is absent."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise InputError(f"the accelerator must be auto, cpu or gpu, got {accelerator!r}.")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("a GPU was asked for and torch sees no CUDA device; use trainer=cpu or trainer=auto.")
    return torch.device("cuda")


def steps_for(max_steps: int, max_tokens: int | None, *, tokens_per_step: int) -> int:
    """Steps of the run: enough for the token budget where there is one, else max_steps."""
    return max_steps if max_tokens is None else math.ceil(max_tokens / tokens_per_step)
