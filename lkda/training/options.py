"""The options of a run in the groups trainer, checkpoint and sample, and their checks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from lkda.checks import InputError, check_count

# The most batches of one optimizer step. A run stops for Ctrl-C only at the end of a step.
MOST_PIECES = 2**16
AUTO = "auto"
# The intervals between two checkpoints if none is given.
GPU_MINUTES, CPU_STEPS = 10.0, 100
# How long a process may wait for the others. The library that connects them takes less for no time at all, and cannot
# represent much more.
TIMEOUT_MINUTES = (0.01, 525_600)
# What may follow a step whose loss or gradient is NaN or infinite.
BAD_STEPS = ("stop", "skip")


@dataclass(frozen=True)
class TrainerOptions:
    """The group `trainer`: the options of configs/trainer/auto.yaml, and the options of Lightning that may be added.

    Attributes:
        target: the trainer's class, `_target_` in the YAML.
        devices: the number of devices of a node.
        strategy: "single", or a name in `lkda.training.strategies`.
        global_batch: whether data.batch_size counts the sequences of all devices. Otherwise it counts those of one.
        context_parallel: the number of devices that divide each sequence among themselves.
        timeout_minutes: how long a process waits for the others before the run ends with an error.
        precision: a name in `lkda.training.precision`.
        max_tokens: the number of tokens to train on. If given, it replaces max_steps.
        bad_steps: what follows a step whose loss or gradient is not finite: "stop" ends the run, "skip" leaves the
            weights and the optimizer as they were.
    """

    target: str
    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    global_batch: bool
    context_parallel: int
    timeout_minutes: float
    precision: str
    max_steps: int
    max_tokens: int | None
    val_check_interval: int
    limit_val_batches: int | float
    log_every_n_steps: int
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    bad_steps: str
    deterministic: bool
    enable_model_summary: bool
    detect_anomaly: bool = False
    profiler: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> TrainerOptions:
        """Create it from checked options with their names in the YAML."""
        return cls(**{"target" if name == "_target_" else name: value for name, value in options.items()})

    @property
    def world_size(self) -> int:
        """The number of processes, each with one device."""
        return self.devices * self.num_nodes

    @property
    def data_parallel(self) -> int:
        """The number of groups of devices that train on different sequences."""
        return self.world_size // self.context_parallel

    def steps(self, tokens_per_step: int) -> int:
        """The optimizer steps of the run: enough for max_tokens if that is given, else max_steps."""
        return self.max_steps if self.max_tokens is None else math.ceil(self.max_tokens / tokens_per_step)


def sequences_per_batch(batch_size: int, trainer: Mapping[str, Any]) -> int:
    """The number of sequences in a batch of all devices.

    Args:
        batch_size: the option of the data.
        trainer: the recorded group. Earlier versions had one device.
    """
    if trainer.get("global_batch", True):
        return batch_size
    world_size = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    return int(batch_size * world_size // trainer.get("context_parallel", 1))


@dataclass(frozen=True)
class CheckpointOptions:
    """The group `checkpoint`.

    Attributes:
        every_minutes: minutes between two checkpoints; None: not by time.
        every_n_steps: optimizer steps between two checkpoints; None: not by steps.
        keep: how many are kept beside best and last.
    """

    every_minutes: float | None
    every_n_steps: int | None
    keep: int

    @classmethod
    def of(cls, options: Mapping[str, Any], *, device: str) -> CheckpointOptions:
        """Create it from checked options. An interval that is "auto" is set only if the other one is not given: on a
        GPU it is a time, because a step there may take milliseconds or seconds, and elsewhere a number of steps.

        Args:
            device: the type of the device, such as "cuda".
        """
        minutes, steps = options["every_minutes"], options["every_n_steps"]
        both = minutes == steps == AUTO
        if minutes == AUTO:
            minutes = GPU_MINUTES if device == "cuda" and steps in (AUTO, None) else None
        if steps == AUTO:
            steps = CPU_STEPS if both and device != "cuda" else None
        return cls(every_minutes=minutes, every_n_steps=steps, keep=options["keep"])


@dataclass(frozen=True)
class SampleOptions:
    """The group `sample`: options for sampling a text at the end of the run."""

    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float


def _names(options: type, *, optional: bool) -> tuple[str, ...]:
    of_that_kind = [field.name for field in fields(options) if (field.default is not MISSING) is optional]
    return tuple("_target_" if name == "target" else name for name in of_that_kind)


PROFILERS = ("simple", "advanced")
STRATEGIES = ("single", "ddp", "fsdp")
MOST_SEED = 2**32 - 1


def check_names(
    group: str, options: object, known: Iterable[str], *, also: Iterable[str] = (), choice: str = "..."
) -> Mapping[str, Any]:
    """Return the options of a group. Raises InputError unless they are all names in `known`, any in `also`, and no
    others.

    Args:
        choice: the choice for the group that has these options, for the message.
    """
    known, also = tuple(known), tuple(also)
    if not isinstance(options, Mapping):
        raise InputError(f"{group} must have the options {', '.join(known)}, got {options!r}.")
    unknown = [name for name in options if name not in (*known, *also)]
    if unknown:
        there = ", ".join(name for name in (*known, *also) if name != "_target_")
        raise InputError(f"{group}.{unknown[0]} is not an option of {group}={choice}, which has {there}.")
    missing = [name for name in known if name not in options]
    if missing:
        raise InputError(f"{group}.{missing[0]} is missing; choose {group}={choice}, which has it.")
    return options


def check_number(name: str, value: object, *, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raise InputError unless `value` is a finite number in the range.

    Args:
        wanted: the range in words, for the message: "greater than 0".
        fits: whether a number is in the range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, got {value!r}.")
    if not fits(value):
        raise InputError(f"{name} must be {wanted}, got {value!r}.")
    if not abs(value) <= sys.float_info.max:
        raise InputError(f"{name} must be a finite number, got {value!r}.")


def check_switch(name: str, value: object) -> None:
    """Raise InputError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}.")


def check_parts(group: str, parts: object, *, kind: str, advice: Callable[[str], str]) -> None:
    """Raise InputError unless a group (logger or callbacks) is a mapping whose entries are null or have a `_target_`.

    Args:
        kind: what an entry is, for the message.
        advice: what to do about an entry of that name, or about the group if it is "", for the message.
    """
    named = parts if isinstance(parts, Mapping) else {}
    given = {name: part for name, part in named.items() if part is not None}
    wrong = [name for name, part in given.items() if not (isinstance(part, Mapping) and "_target_" in part)]
    if wrong or not isinstance(parts, Mapping):
        name = wrong[0] if wrong else ""
        what = f"{group}.{name}" if name else group
        raise InputError(f"{what} is not a {kind}, which needs an entry _target_: {advice(name)}.")


def check_trainer(options: object) -> None:
    """Raise InputError for an option of the group trainer that is unknown, or has a value that cannot be used.

    `accelerator` is checked in `lkda.device`, and `precision` in `lkda.training.precision`.
    """
    options = check_names(
        "trainer",
        options,
        _names(TrainerOptions, optional=False),
        also=_names(TrainerOptions, optional=True),
        choice="auto",
    )
    _check_devices(options)
    for name in ("max_steps", "val_check_interval", "log_every_n_steps"):
        check_count(f"trainer.{name}", options[name], least=1)
    check_count("trainer.accumulate_grad_batches", options["accumulate_grad_batches"], least=1, most=MOST_PIECES)
    if options["max_tokens"] is not None:
        check_count("trainer.max_tokens", options["max_tokens"], least=1)
    _check_validation_part(options["limit_val_batches"])
    if options["gradient_clip_val"] is not None:
        check_number(
            "trainer.gradient_clip_val",
            options["gradient_clip_val"],
            wanted="0 or more (0 or null: no clipping)",
            fits=lambda value: value >= 0,
        )
    if options["bad_steps"] not in BAD_STEPS:
        raise InputError(f"trainer.bad_steps must be {' or '.join(BAD_STEPS)}, got {options['bad_steps']!r}.")
    check_switch("trainer.enable_model_summary", options["enable_model_summary"])
    check_switch("trainer.detect_anomaly", options.get("detect_anomaly", False))
    check_switch("trainer.deterministic", options["deterministic"])
    profiler = options.get("profiler")
    if profiler is not None and profiler not in PROFILERS:
        raise InputError(f"trainer.profiler must be one of {', '.join(PROFILERS)}, or null; got {profiler!r}.")


def _check_devices(options: Mapping[str, Any]) -> None:
    if options["strategy"] not in STRATEGIES:
        raise InputError(f"trainer.strategy must be one of {', '.join(STRATEGIES)}, got {options['strategy']!r}.")
    if options["devices"] != "auto":
        check_count("trainer.devices", options["devices"], least=1)
    for name in ("num_nodes", "context_parallel"):
        check_count(f"trainer.{name}", options[name], least=1)
    minutes, (least, most) = options["timeout_minutes"], TIMEOUT_MINUTES
    wanted = f"from {least} to {most} (a year)"
    check_number("trainer.timeout_minutes", minutes, wanted=wanted, fits=lambda value: least <= value <= most)
    check_switch("trainer.global_batch", options["global_batch"])
    if options["strategy"] != "single":
        return
    for name in ("devices", "num_nodes", "context_parallel"):
        if options[name] != 1:
            raise InputError(
                f"trainer.{name}={options[name]} needs several devices: choose trainer=ddp, or trainer=fsdp for a "
                f"model that is too large for one of them, beside trainer.{name}."
            )


def _check_validation_part(value: object) -> None:
    name = "trainer.limit_val_batches"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number of batches, or a fraction of them in (0, 1], got {value!r}.")
    if not value > 0:
        raise InputError(f"{name} must be above 0: a run always validates at the end; got {value!r}.")
    if isinstance(value, float) and value > 1:
        raise InputError(f"{name} must be a whole number of batches, or a fraction of them in (0, 1], got {value!r}.")


def check_validation_batches(limit: int | float, batches: int) -> None:
    """Raise InputError if the fraction `trainer.limit_val_batches` of the validation batches is less than one batch."""
    if isinstance(limit, float) and int(limit * batches) < 1:
        raise InputError(
            f"trainer.limit_val_batches={limit} of {batches} validation batches is less than one batch: "
            f"give a number of batches, such as trainer.limit_val_batches=1, or a larger fraction."
        )


def check_checkpoint(options: object) -> None:
    """Raise InputError for an option of the group checkpoint that is unknown or outside its range."""
    options = check_names("checkpoint", options, _names(CheckpointOptions, optional=False))
    check_count("checkpoint.keep", options["keep"], least=1)
    minutes, steps = options["every_minutes"], options["every_n_steps"]
    if isinstance(minutes, str) and minutes != AUTO:
        raise InputError(f"checkpoint.every_minutes must be a number, auto or null, got {minutes!r}.")
    if minutes is not None and minutes != AUTO:
        check_number("checkpoint.every_minutes", minutes, wanted="greater than 0", fits=lambda value: value > 0)
    if steps is not None and steps != AUTO:
        check_count("checkpoint.every_n_steps", steps, least=1)


def check_sample(options: object) -> None:
    """Raise InputError for an option of the group sample that is unknown or outside its range."""
    options = check_names("sample", options, _names(SampleOptions, optional=False))
    if not isinstance(options["prompt"], str):
        raise InputError(
            f"sample.prompt must be text, got {options['prompt']!r}: quote a number, as in sample.prompt=\"'1776'\"."
        )
    check_count("sample.max_new_tokens", options["max_new_tokens"], least=0)
    check_number("sample.temperature", options["temperature"], wanted="0 or more", fits=lambda value: value >= 0)
    check_number("sample.top_p", options["top_p"], wanted="in (0, 1]", fits=lambda value: 0 < value <= 1)
