"""Rejects options of the command line that have no effect beside another setting, instead of ignoring them.

There is a table for each command. It lists the option, the condition under which it has no effect, and the reason. Only
options on the command line are checked: an experiment, a debug choice or a default may set options that a run does not
use.

Importing this module does not import torch: scripts/prepare_data.py, which keeps its memory small, does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import get_class

from lkda.checks import InputError
from lkda.commands.command_line.invocation import typed_overrides
from lkda.data.prose.sources import MIXES

# Looks up the value of a setting by its dotted name; None if there is no such setting.
Get = Callable[[str], Any]
Condition = Callable[[Get], bool]

_PREPARED = tuple(MIXES)  # the choices of data= that scripts/prepare_data.py makes


@dataclass(frozen=True)
class _Unused:
    """`option`, and every option inside it, has no effect if `when` is true.

    Attributes:
        option: its dotted name.
        when: the condition.
        where: the end of the sentence "OPTION has no effect ...", which names the other setting.
    """

    option: str
    when: Condition
    where: str


def _is(name: str, *values: object) -> Condition:
    return lambda get: get(name) in values


def _is_not(name: str, value: object) -> Condition:
    return lambda get: get(name) != value


def _has_value(name: str) -> Condition:
    return lambda get: bool(get(name))


def _is_given_too(name: str) -> Condition:
    return lambda get: name in given_options()


def _no_layer_is_of(mixer: str) -> Condition:
    return lambda get: mixer not in _layers(get)


def _rates_of_other_models(get: Get) -> bool:
    given = [key for key in given_options() if key.startswith("mixer.learning_rate.")]
    return bool(given) and f"mixer.learning_rate.{get('model.name')}" not in given


def _tokens_are_no_text(get: Get) -> bool:
    from lkda.data.text.packed import PackedDataModule

    return not issubclass(get_class(get("data._target_")), PackedDataModule)


def _pins_nothing(get: Get) -> bool:
    import torch

    return get("data.pin_memory") is True and not torch.cuda.is_available()


def _sweeps(get: Get) -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _no_jobs_at_once(get: Get) -> bool:
    return not _sweeps(get) or "joblib" not in str(HydraConfig.get().launcher.get("_target_"))


def _always(get: Get) -> bool:
    return True


def _each(options: Sequence[str], when: Condition, where: str) -> list[_Unused]:
    return [_Unused(option, when, where) for option in options]


DATA = (
    _Unused("data.val_fraction", _has_value("data.val_paths"), "beside data.val_paths"),
    _Unused("data.val_fraction", _has_value("data.val_from_year"), "beside data.val_from_year"),
    _Unused("data.val_fraction", _has_value("data.val_split"), "beside data.val_split"),
    _Unused("data.test_fraction", _has_value("data.test_paths"), "beside data.test_paths"),
    _Unused("data.test_fraction", _has_value("data.test_from_year"), "beside data.test_from_year"),
    _Unused("data.test_fraction", _has_value("data.test_split"), "beside data.test_split"),
    _Unused("data.vocab_size", _has_value("data.tokenizer_path"), "beside data.tokenizer_path"),
    *(
        _Unused("data.vocab_size", _is("data.source", name), f"with data={name}, which has its own tokenizer")
        for name in _PREPARED
    ),
    _Unused("data.pin_memory", _pins_nothing, "where there is no GPU"),
    _Unused("data.cache_dir", _has_value("data.directory"), "beside data.directory"),
    _Unused("data.shortest", _is("data.packed", False), "without data.packed=true"),
    *_each(
        ("data.val_fraction", "data.val_from_year", "data.test_fraction", "data.text_column"),
        _is("data.source", "sotu", *_PREPARED),
        f"with data=sotu and data={' and data='.join(_PREPARED)}, which have a fixed validation split",
    ),
)

RATES = (
    *_each(("model.learning_rate", "mixer.learning_rate"), _has_value("optimizer.lr"), "beside optimizer.lr"),
    _Unused("mixer.learning_rate", _has_value("model.learning_rate"), "beside model.learning_rate"),
    _Unused("mixer.learning_rate", _rates_of_other_models, "for a model of another name, model.name"),
)


def of_training() -> tuple[_Unused, ...]:
    """The table of scripts/train.py."""
    from lkda.models.mixers import mixer_names

    return (
        *(
            _Unused(f"mixer.{name}", _no_layer_is_of(name), f"in a model without a {name} layer")
            for name in mixer_names()
        ),
        _Unused(
            "mixer.num_heads", lambda get: _layers(get) == {"conv"}, "in a model of conv layers, which have no heads"
        ),
        _Unused("mixer.kda.gate_form", _is("mixer.kda.gate", "none"), "beside mixer.kda.gate=none"),
        _Unused("mixer.kda.lower_bound", _is("mixer.kda.gate", "none"), "beside mixer.kda.gate=none"),
        _Unused(
            "mixer.kda.lower_bound", _is_not("mixer.kda.gate_form", "bounded"), "without mixer.kda.gate_form=bounded"
        ),
        _Unused("mixer.softmax.norm_eps", _is_not("mixer.softmax.qk_norm", True), "without mixer.softmax.qk_norm=true"),
        _Unused("model.num_heads", _is_given_too("mixer.num_heads"), "beside mixer.num_heads"),
        _Unused("model.init.head_std", _is("model.tie_embeddings", True), "beside model.tie_embeddings=true"),
        _Unused("optimizer.lr_scale.head", _is("model.tie_embeddings", True), "beside model.tie_embeddings=true"),
        *(
            _Unused(f"mixer.{name}.conv_std", _is(f"mixer.{name}.conv_width", 0), f"beside mixer.{name}.conv_width=0")
            for name in mixer_names()
        ),
        _Unused("trainer.max_steps", _is_not("trainer.max_tokens", None), "beside trainer.max_tokens"),
        _Unused("sample", _tokens_are_no_text, "for data whose tokens are not text"),
        *_each(
            ("sample.temperature", "sample.top_p"), _is("sample.max_new_tokens", 0), "beside sample.max_new_tokens=0"
        ),
        _Unused("sample.top_p", _is("sample.temperature", 0), "beside sample.temperature=0"),
        _Unused("jobs_per_gpu", _no_jobs_at_once, "without a sweep with hydra/launcher=joblib"),
        _Unused("hydra.run.dir", _sweeps, "in a sweep, which uses hydra.sweep.dir"),
        *_each(
            ("hydra.sweep.dir", "hydra.sweep.subdir"),
            lambda get: not _sweeps(get),
            "in a single run, which uses hydra.run.dir",
        ),
    )


GENERATE = (
    *_each(
        ("temperature", "top_k", "top_p", "min_p", "stop", "ignore_eos"),
        _is("max_new_tokens", 0),
        "beside max_new_tokens=0",
    ),
    *_each(
        ("top_k", "top_p", "min_p", "num_samples"),
        _is("temperature", 0),
        "beside temperature=0, which always takes the most likely token",
    ),
    _Unused("out", _is("prompts", None), "without prompts=..., whose texts are written to it"),
)

PREPARE_DATA = (
    *_each(("text_column", "val_fraction", "test_fraction"), _is("paths", None), "without paths=[...]"),
    _Unused("vocab_size", _has_value("tokenizer_path"), "beside tokenizer_path"),
)

EVALUATE = (
    _Unused("seed", _always, "in an evaluation, which samples nothing"),
    *_each(("data.seed", "data.num_workers"), _always, "in an evaluation: it concerns only training batches"),
)

_OF_OPERATORS = ("ops", "backends", "gates", "modes", "replays")
_OF_STEPS = ("packed", "compile", "bare", "cold", "steps", "check")
_OF_DECODING = ("batches", "contexts", "state_dtypes", "top_p", "prefill")
_OF_MODELS = ("models", "mixers", "vocab_size", "time_limit", "overrides")
_STEPS, _DECODING = "with task=step, which measures training steps of whole models", "with task=decode"
_ALL = "with task=all, which measures a fixed set: name one of task=op, task=step and task=decode"
_NOTES = "with task=notes, which measures a fixed table"
BENCHMARK = (
    *_each(
        (*_OF_OPERATORS, *_OF_STEPS, *_OF_DECODING, *_OF_MODELS, "dtypes", "shapes", "peers", "milliseconds"),
        _is("task", "all"),
        _ALL,
    ),
    *_each(
        (*_OF_OPERATORS, *_OF_STEPS, *_OF_DECODING, *_OF_MODELS, "dtypes", "shapes", "peers"),
        _is("task", "notes"),
        _NOTES,
    ),
    _Unused("minutes", _is_not("task", "all"), "without task=all, whose parts it limits"),
    *_each((*_OF_MODELS, *_OF_STEPS, *_OF_DECODING), _is("task", "op"), "with task=op, which measures operators"),
    *_each((*_OF_OPERATORS, "milliseconds", "dtypes", *_OF_DECODING), _is("task", "step"), _STEPS),
    *_each((*_OF_OPERATORS, "milliseconds", *_OF_STEPS), _is("task", "decode"), _DECODING),
    _Unused("shapes", _is("task", "decode"), "with task=decode: give batches and contexts"),
    *_each(
        (
            "models",
            "mixers",
            "shapes",
            "packed",
            "peers",
            "vocab_size",
            "compile",
            "bare",
            "cold",
            "steps",
            "overrides",
        ),
        _is_not("check", None),
        "beside check, which measures the recorded rows again with their settings",
    ),
)


def check_unused(table: tuple[_Unused, ...], settings: Mapping[str, Any]) -> None:
    """Raise InputError for an option of the command line that has no effect beside `settings`.

    Args:
        table: of the command.
        settings: the resolved configuration of the command, which must be valid.
    """
    for key in given_options():
        for unused in table:
            if f"{key}.".startswith(f"{unused.option}.") and unused.when(lambda name: _value(settings, name)):
                raise InputError(f"{key} has no effect {unused.where}; leave it out.")


def _value(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def given_options() -> list[str]:
    """The dotted names of the settings on the command line. A dictionary gives one name for each of its entries. In a
    sweep they are those of the current job.

    A setting that is set to null counts as left out.
    """
    parsed = OverridesParser.create().parse_overrides([*typed_overrides(), *typed_overrides(of_hydra=True)])
    assigned = (override for override in parsed if not override.is_delete() and not override.is_sweep_override())
    return [key for override in assigned for key in _leaves(override.key_or_group, override.value())]


def _leaves(key: str, value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    elif value is not None:
        yield key


def _layers(get: Get) -> set[str]:
    """The names of the mixers in the layers of the model."""
    pattern = get("mixer.pattern")
    return {pattern[layer % len(pattern)] for layer in range(get("model.num_layers"))}
