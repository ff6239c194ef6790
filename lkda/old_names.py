"""What run directories and exported directories of earlier versions say, as it is said today."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

# `_target_` of the data. Checkpoints hold no module's name.
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


# Options of the scheduler.
_SCHEDULER = {"final": "min_lr_ratio", "decay": "decay_fraction"}
# Options that came later, by group, with what every run before them had.
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
# Of data by source, where text had no test split.
_LATER_OF_DATA: dict[str, dict[str, Any]] = {
    "files": {"test_paths": [], "test_from_year": None, "test_fraction": 0.0},
    "sotu": {"test_from_year": None},
    "hub": {"test_split": None, "test_fraction": 0.0},
}


def later_options(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The options that a recorded configuration lacks because they came later, as {"model.embed_norm": what it had}.

    KDA and simplified attention without a convolution had no activation. How filters begin was once the model's to say.
    """
    missing: dict[str, Any] = {}
    model = config.get("model")
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


def _source_of(data: Mapping[Any, Any]) -> str:
    """sotu, files, prose or hub; "" for data that are no text."""
    return "hub" if str(data.get("_target_")).endswith(".HubDataModule") else str(data.get("source", ""))


def with_options(config: Mapping[Any, Any], options: Mapping[str, Any]) -> dict[Any, Any]:
    """A copy of a nested configuration with other values at some dotted names."""
    found = copy.deepcopy(dict(config))
    for name, value in options.items():
        *path, last = name.split(".")
        group = found
        for part in path:
            group = group[part]
        group[last] = copy.deepcopy(value)
    return found


def translated(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A recorded configuration as it would be written today: a copy, equal where it holds nothing old."""
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
    """The number of heads is the mixer's and the learning rate the optimizer's; the model's were what they referred
    to."""
    heads, rate = config["model"].pop("num_heads", None), config["model"].pop("learning_rate", None)
    if config["mixer"].get("num_heads") is None and heads is not None:
        config["mixer"]["num_heads"] = heads
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("lr") is None and rate is not None:
        optimizer["lr"] = rate


def current_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a saved model as `build_model` takes it today, so that the model computes what it computed."""
    if not isinstance(config.get("mixer"), Mapping):
        return dict(config)
    later = later_options({"mixer": config["mixer"], "model": config})
    of_mixers = {name: value for name, value in later.items() if name.startswith("mixer.")}
    return _without_filters(with_options(config, of_mixers))


def _without_filters(model: dict[str, Any]) -> dict[str, Any]:
    """`model` without `init.conv_std`, which mixers have today."""
    init = model.get("init")
    if not isinstance(init, Mapping) or "conv_std" not in init:
        return model
    return {**model, "init": {name: value for name, value in init.items() if name != "conv_std"}}
