"""Turns Hydra's configuration into a `RunPlan`: it is resolved and checked once, and later code uses only the plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError, check_count, check_types, check_values
from lkda.commands.command_line.invocation import given_overrides
from lkda.commands.run.callback_options import check_callbacks, stop_accuracy
from lkda.commands.run.init_from import check_exported, load_initial_model, mixer_name
from lkda.commands.run.learning_rate import measured_learning_rate
from lkda.commands.run.run_directory import recorded_config
from lkda.commands.settings.config import resolve
from lkda.commands.settings.data_options import check_data_options
from lkda.commands.settings.paths import with_absolute_paths
from lkda.commands.settings.targets import check_arguments, located
from lkda.commands.settings.unused_options import RATES, check_unused, of_training
from lkda.data.text.cache import expanded
from lkda.data.text.tokenizer import check_vocab_size
from lkda.device import physical_memory, resolve_device, resolve_device_count
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.old_names import later_options, with_options
from lkda.training.losses import CHECKPOINTING
from lkda.training.memory import check_parameters
from lkda.training.optimizer import check_optimizer, check_schedule
from lkda.training.options import (
    MOST_SEED,
    CheckpointOptions,
    SampleOptions,
    TrainerOptions,
    check_checkpoint,
    check_parts,
    check_sample,
    check_switch,
    check_trainer,
    sequences_per_batch,
)
from lkda.training.precision import FSDP_PRECISIONS, PRECISIONS, resolve_precision

GROUPS = ("model", "mixer", "data", "optimizer", "scheduler", "trainer", "checkpoint", "sample", "callbacks", "logger")
# Options of the groups `model` and `mixer` that are not options of a model: its name, and defaults for other groups.
_NOT_THE_MODELS = ("name", "num_heads", "learning_rate")
_NOT_THE_MIXERS = ("learning_rate",)
# Entries of a model's config that are not in the group `model`.
_NOT_OF_THE_GROUP = ("mixer", "backend", "context")


@dataclass(frozen=True)
class RunPlan:
    """All checked options of a run. Only what depends on the prepared data is missing.

    Attributes:
        record: the resolved configuration, as config.yaml holds it.
        model_name, mixer_name: the names of the model and the mixer.
        model: the dict of `build_model`, without its context. A vocab_size of None means that of the data.
        initial: the model that the run starts from; None if it starts from random weights.
        data: options of the data module, with its `_target_`. Its batch_size is that of all devices together.
        optimizer: what `build_optimizer` takes.
        scheduler: what `learning_rate_factor` takes.
        callbacks, loggers: each with its `_target_`.
        stop_accuracy: the option that ends the run at an accuracy of the validation, and its value; None if there is
            none.
        device: the device to train on.
        backends: the backend of each operator, as {"kda": "chunk"}.
        compile: True compiles the model's blocks with `torch.compile`. "auto" means on a GPU the same with CUDA graphs,
            on a CPU no compilation.
        checkpointing: "none", or "block" to compute each block again in the backward pass instead of keeping its
            intermediate results.
        resume: whether to continue the run that is in the run directory.
        init_from: the directory that `initial` comes from.
    """

    record: dict[str, Any]
    seed: int
    model_name: str
    mixer_name: str
    model: dict[str, Any]
    initial: LanguageModel | None
    data: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    trainer: TrainerOptions
    checkpoint: CheckpointOptions
    sample: SampleOptions
    callbacks: list[dict[str, Any]]
    stop_accuracy: tuple[str, float] | None
    loggers: list[dict[str, Any]]
    device: torch.device
    backends: dict[str, str]
    compile: bool | str
    checkpointing: str
    resume: bool
    init_from: str | None


def plan_run(config: DictConfig, run_dir: Path) -> RunPlan:
    """The plan of the run that `config`, composed from configs/train.yaml, describes.

    Args:
        run_dir: the run directory. It is only read, and only if a run is resumed.
    Raises: InputError for settings that cannot be used, before anything is written and before the data are prepared.
    """
    settings = _resolved(config)
    recorded = recorded_config(run_dir) if settings["resume"] else None
    check_unused(RATES, settings)
    _check_init_from(settings["init_from"], rope_base=settings.get("rope_base"))
    settings = _checked(settings, recorded)
    settings, initial = _with_initial_model(settings, config)
    if initial is None:
        _check_vocabulary(settings["data"], config)
    check_data_options(settings["data"])
    settings = with_recorded_options(settings, recorded or {}, of_model=initial is None)
    plan = _plan(settings, initial)
    check_unused(of_training(), plan.record)
    return plan


def settings_as_recorded(config: DictConfig, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as config.yaml would hold them, for a comparison with that of a run on another machine.

    So trainer.precision stays as given, and the directory of `init_from` need not be there. The groups model and mixer
    are then not those of its model.

    Args:
        config: composed from configs/train.yaml.
        recorded: the config.yaml of the run.
    Raises: InputError for settings that are wrong for every device and all data.
    """
    settings = _resolved(config)
    check_unused(RATES, settings)
    settings = _checked(settings, recorded)
    from_scratch = settings["init_from"] is None
    if from_scratch:  # otherwise data.vocab_size is that of the model
        check_data_options(settings["data"])
    settings = with_recorded_options(settings, recorded, of_model=from_scratch)
    return settings | groups_of(model_options(settings), model_name=settings["model"]["name"])


def _resolved(config: DictConfig) -> dict[str, Any]:
    settings = resolve(config)
    for group in GROUPS:
        if settings.get(group) is None:
            raise InputError(f"{group} must not be null: leave {group}=null out, or choose another {group}.")
    check_switch("resume", settings["resume"])
    return settings


def _checked(settings: dict[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings with a learning rate and absolute paths. Those that every run has are checked."""
    settings = _with_learning_rate(settings, recorded)
    _check(settings)
    return with_absolute_paths(settings)


def _with_learning_rate(settings: dict[str, Any], recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings with a number for an `optimizer.lr` that is null: the rate of the run that is resumed, or the
    measured rate."""
    optimizer = settings["optimizer"]
    if not isinstance(optimizer, Mapping) or optimizer.get("lr", "absent") is not None:
        return settings
    before = recorded.get("optimizer") if recorded and not _gives_a_rate() else None
    rate = before.get("lr") if isinstance(before, Mapping) else None
    if rate is None and settings["init_from"] is not None and settings["model"].get("learning_rate") is None:
        raise InputError(
            "no learning rate is known for the model of init_from: give optimizer.lr=RATE, for example "
            "optimizer.lr=1e-3."
        )
    if rate is None:
        rate = measured_learning_rate(settings["model"], settings["mixer"])
    return {**settings, "optimizer": {**optimizer, "lr": rate}}


def _gives_a_rate() -> bool:
    """Whether the command line does, other than by optimizer.lr."""
    names = ("model.learning_rate", "mixer.learning_rate")
    return any(word.lstrip("+").startswith(names) for word in given_overrides(without=()))


def _check(settings: dict[str, Any]) -> None:
    """Raise InputError for settings that are wrong for every device and all data."""
    check_trainer(settings["trainer"])
    check_optimizer(settings["optimizer"])
    check_schedule(settings["scheduler"])
    check_checkpoint(settings["checkpoint"])
    check_sample(settings["sample"])
    _check_loggers(settings["logger"])
    check_callbacks(settings["callbacks"])
    for group in ("model", "mixer"):
        check_values({"name": settings[group].get("name")}, {"name": str}, prefix=f"{group}.")
    check_count("seed", settings["seed"], least=0, most=MOST_SEED)
    if settings["compile"] not in ("auto", True, False):
        raise InputError(f"compile must be auto, true or false, got {settings['compile']!r}.")
    if settings["checkpointing"] not in CHECKPOINTING:
        raise InputError(f"checkpointing must be {' or '.join(CHECKPOINTING)}, got {settings['checkpointing']!r}.")


def _check_loggers(loggers: Any) -> None:
    check_parts("logger", loggers, kind="logger", advice=lambda name: "choose logger=wandb first")
    for name, options in loggers.items():
        if not options:
            continue
        function = located(f"logger.{name}", options["_target_"])
        check_arguments(function, f"logger.{name}", options, partial=True)
        if str(options["_target_"]).startswith("lkda."):
            check_types(function, options, prefix=f"logger.{name}.")


def _check_rope_base(base: object, *, init_from: str | None) -> None:
    """Raise InputError for a base that is no positive number, or without a model to use it in."""
    check_values({"rope_base": base}, {"rope_base": float | None})
    if isinstance(base, int | float) and base <= 0:
        raise InputError(f"rope_base must be a number above 0, got {base}.")
    if base is not None and init_from is None:
        raise InputError(
            f"rope_base={base} changes the model of init_from, which is null: give init_from, or leave rope_base out "
            "and set mixer.softmax.rope_base or mixer.mla.rope_base."
        )


def _check_init_from(given: object, *, rope_base: object) -> None:
    """Raise InputError if it is neither null nor an exported directory. This comes before a learning rate is looked
    for, because nobody can give one for a model that is not there."""
    if not isinstance(given, str | None) or given == "":
        raise InputError(f"init_from must be the path of an exported directory, got {given!r}.")
    _check_rope_base(rope_base, init_from=given)
    if given is not None:
        check_exported(expanded(given))


def _check_vocabulary(data: Mapping[str, Any], config: DictConfig) -> None:
    """Raise InputError for a model.vocab_size that is also the data.vocab_size of a tokenizer to train, and too small.
    The data module would name data.vocab_size, which nobody gave."""
    trains_one = "vocab_size" in data and data.get("tokenizer_path", "absent") is None
    if not trains_one or not OmegaConf.is_interpolation(config.data, "vocab_size"):
        return
    check_count("model.vocab_size", data["vocab_size"], least=1)
    check_vocab_size(data["vocab_size"], option="model.vocab_size")


def _with_initial_model(settings: dict[str, Any], config: DictConfig) -> tuple[dict[str, Any], LanguageModel | None]:
    """The settings for the model of `init_from`, and that model. The settings get its tokenizer, and its mixer's name
    wherever the configuration refers to the name, for example in a logger's name of the run. If `init_from` is null,
    the settings are unchanged and the model is None.
    """
    if settings["init_from"] is None:
        return settings, None
    directory = Path(settings["init_from"])
    initial = load_initial_model(
        directory, backend=settings["backend"], data=settings["data"], rope_base=settings.get("rope_base")
    )
    data = {**settings["data"], "tokenizer_path": str(directory / "tokenizer.json")}
    if "vocab_size" in data:
        data["vocab_size"] = initial.config["vocab_size"]
    named = copy.deepcopy(config)
    named.mixer.name = mixer_name(initial)
    shown = {group: OmegaConf.to_container(named[group], resolve=True) for group in ("logger", "callbacks")}
    return {**settings, **shown, "mixer": {**settings["mixer"], "name": named.mixer.name}, "data": data}, initial


def with_recorded_options(
    settings: dict[str, Any], recorded: Mapping[str, Any], *, of_model: bool = True
) -> dict[str, Any]:
    """The settings of a resumed run. An option that did not exist when the run began keeps the value that was then in
    effect.

    Args:
        recorded: the config.yaml of the run that is resumed; {} if there is none.
        of_model: whether the groups model and mixer describe the model.
    """
    given = given_overrides(without=())

    def applies(name: str) -> bool:
        *path, _ = name.split(".")
        group: Any = settings
        for part in path:
            group = group.get(part) if isinstance(group, Mapping) else None
        named = any(word.lstrip("+~").startswith((f"{name}=", f"{name}.")) for word in given)
        return isinstance(group, Mapping) and not named and (of_model or path[0] not in ("model", "mixer"))

    return with_options(settings, {name: value for name, value in later_options(recorded).items() if applies(name)})


def _plan(settings: dict[str, Any], initial: LanguageModel | None) -> RunPlan:
    """The plan. Each setting is already checked by itself; this checks the device, the model, and their combination."""
    accelerator = settings["trainer"]["accelerator"]
    device = resolve_device(accelerator, option="trainer.accelerator", instead="trainer=cpu or trainer=auto")
    precision = resolve_precision(settings["trainer"]["precision"], device)
    devices = resolve_device_count(settings["trainer"]["devices"], device)
    trainer = {**settings["trainer"], "precision": precision, "devices": devices}
    data = _data_of_all_devices(settings["data"], trainer)
    if trainer["context_parallel"] > 1 and settings["compile"] is True:
        raise InputError(
            "compile=true cannot be used with trainer.context_parallel: use compile=auto or compile=false."
        )
    if trainer["strategy"] == "fsdp" and precision not in FSDP_PRECISIONS:
        raise InputError(
            f"trainer.precision={precision} cannot be used with trainer=fsdp: use {' or '.join(FSDP_PRECISIONS)}."
        )
    if trainer["bad_steps"] == "skip" and (precision == "16-mixed" or trainer["strategy"] == "fsdp"):
        what = "trainer=fsdp" if trainer["strategy"] == "fsdp" else "trainer.precision=16-mixed"
        raise InputError(f"trainer.bad_steps=skip cannot be used with {what}: use trainer.bad_steps=stop.")
    model = model_options(settings) if initial is None else model_options_of(initial)
    copies = devices if trainer["strategy"] == "ddp" else 1
    backends = check_model(model, device=device, precision=PRECISIONS[precision], copies=copies, initial=initial)
    model_name = settings["model"]["name"] if initial is None else _name_of_initial(model, settings["model"])
    return RunPlan(
        record=settings | groups_of(model, model_name=model_name) | {"trainer": trainer},
        seed=settings["seed"],
        model_name=model_name,
        mixer_name=settings["mixer"]["name"],
        model=model,
        initial=initial,
        data=data,
        optimizer=settings["optimizer"],
        scheduler=settings["scheduler"],
        trainer=TrainerOptions.of(trainer),
        checkpoint=CheckpointOptions.of(settings["checkpoint"], device=device.type),
        sample=SampleOptions(**settings["sample"]),
        callbacks=[node for node in settings["callbacks"].values() if node],
        stop_accuracy=stop_accuracy(settings["callbacks"]),
        loggers=[node for node in settings["logger"].values() if node],
        device=device,
        backends=backends,
        compile=settings["compile"],
        checkpointing=settings["checkpointing"],
        resume=settings["resume"],
        init_from=settings["init_from"],
    )


def _data_of_all_devices(data: dict[str, Any], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The group data with the batch_size of all devices. Raises InputError if the devices cannot divide it."""
    world_size, context = trainer["devices"] * trainer["num_nodes"], trainer["context_parallel"]
    if world_size % context:
        raise InputError(
            f"trainer.context_parallel={context} must divide the number of devices, which is {world_size}."
        )
    groups = world_size // context
    if "batch_size" not in data:  # for evaluation alone
        return data
    check_count("data.batch_size", data["batch_size"], least=1)
    batch_size = sequences_per_batch(data["batch_size"], trainer)
    if batch_size % groups:
        raise InputError(
            f"data.batch_size={batch_size} sequences cannot be divided among {groups} devices: give a multiple of "
            f"{groups}, or trainer.global_batch=false if it is meant for each device."
        )
    return {**data, "batch_size": batch_size}


def model_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The dict of `build_model`, without the context, from the resolved groups model, mixer and backend.

    A `num_heads` of the mixer that is null takes the model's value.
    """
    model = {name: value for name, value in settings["model"].items() if name not in _NOT_THE_MODELS}
    mixer = {name: value for name, value in settings["mixer"].items() if name not in _NOT_THE_MIXERS}
    if mixer.get("num_heads") is None:
        mixer["num_heads"] = settings["model"].get("num_heads")
    return {**model, "backend": settings["backend"], "mixer": mixer}


def model_options_of(initial: LanguageModel) -> dict[str, Any]:
    """The dict of `build_model`, without the context, of a model that exists already."""
    mixer = {"name": mixer_name(initial), **initial.config["mixer"]}
    return {**{name: value for name, value in initial.config.items() if name != "context"}, "mixer": mixer}


def _name_of_initial(model: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """The name of the model of `init_from`, whose directory has none: that of the chosen `model=` if it has the same
    depth and width or if model.name is given, otherwise LAYERSxWIDTH."""
    same_size = all(model[name] == chosen.get(name) for name in ("num_layers", "d_model"))
    given = any(word.lstrip("+").startswith("model.name=") for word in given_overrides(without=()))
    return str(chosen["name"]) if same_size or given else f"{model['num_layers']}x{model['d_model']}"


def groups_of(model: Mapping[str, Any], *, model_name: str) -> dict[str, dict[str, Any]]:
    """The groups `model` and `mixer`, as recorded in config.yaml, from a dict of `build_model`."""
    own = {name: value for name, value in model.items() if name not in _NOT_OF_THE_GROUP}
    return {"model": {"name": model_name, **own}, "mixer": dict(model["mixer"])}


def check_model(
    model: Mapping[str, Any],
    *,
    device: torch.device,
    precision: torch.dtype,
    copies: int = 1,
    initial: LanguageModel | None = None,
) -> dict[str, str]:
    """Check that the model can be built. Returns the backends that it uses on the device, as {"kda": "chunk"}.

    The model is built on the device "meta", without memory. Preparing the data may take minutes, and an error in the
    model is reported before that.

    Args:
        model: the dict of `build_model`.
        copies: how many processes of the machine hold the whole model.
        initial: the model, if it exists already.
    Raises: InputError if the model cannot be built, is larger than the memory of a CPU, or if a backend cannot run on
        the device.
    """
    if initial is not None:
        return initial.resolve_backends(device, precision)
    if model["vocab_size"] is not None:
        check_count("model.vocab_size", model["vocab_size"], least=1)
    try:
        with torch.device("meta"):
            made = build_model({**model, "vocab_size": model["vocab_size"] or 1})
            backends = made.resolve_backends(device, precision)
    except (RuntimeError, OverflowError) as error:  # the size of a tensor in bytes overflows in torch
        raise InputError(f"the model is too large ({str(error).splitlines()[0]}): lower its sizes.") from error
    if device.type == "cpu":  # a GPU has an error of its own for this
        count = sum(parameter.numel() for parameter in made.parameters())
        check_parameters(count, copies=copies, available=physical_memory())
    return backends


def require_one_device(plan: RunPlan, *, what: str) -> None:
    """Raise InputError, naming `what` does not run on several devices, if the plan has them."""
    if plan.trainer.strategy != "single":
        raise InputError(f"{what} measures one device: leave trainer={plan.trainer.strategy} out.")
