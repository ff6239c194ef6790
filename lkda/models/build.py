"""Builds a model from a plain dict of names and numbers. Only mixers of this package are imported by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lkda.checks import InputError, check_count, check_types
from lkda.models.block import Block
from lkda.models.lm import LanguageModel
from lkda.models.mixer import Mixer
from lkda.models.mixers import find_mixer, mixer_names
from lkda.models.short_conv import convolutions_drawn_later
from lkda.ops import available_backends

# Used where a config lacks an option, so that models from before the option existed stay the same.
DEFAULTS: dict[str, Any] = {
    "mlp_hidden": 0,
    "norm_eps": 1e-5,
    "tie_embeddings": True,
    "embed_norm": False,
    "embed_scale": 1.0,
    "init": {},
    "backend": "auto",
    "context": 0,
}
# Larger than any machine can hold; building such a model would take for ever.
_MOST = {"vocab_size": 2**26, "d_model": 2**20, "mlp_hidden": 2**22, "num_layers": 2**14}
REQUIRED = ("vocab_size", "d_model", "num_layers", "mixer")


def build_model(config: Mapping[str, Any]) -> LanguageModel:
    """Builds a model from plain values and initialises it with torch's global random generator.

    Args:
        config: vocab_size, d_model, num_layers, mixer; optionally mlp_hidden (0: no feed-forward layers), norm_eps,
            tie_embeddings, embed_norm (an RMSNorm of the embedding), embed_scale (a factor on it), init (see
            `lkda.models.init`), backend, and context (that of training, for the record). `mixer` holds `pattern` (mixer
            names, repeated over depth), `num_heads`, the options of each mixer under its name, and a `name` for the
            record.
    Raises: ValueError for a missing, unknown or impossible value, naming possible ones.
    """
    unknown = set(config) - {*REQUIRED, *DEFAULTS}
    missing = [key for key in REQUIRED if key not in config]
    if unknown or missing:
        raise InputError(
            f"a model's config holds {', '.join((*REQUIRED, *DEFAULTS))}; "
            f"missing here: {', '.join(missing) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}."
        )
    plain: dict[str, Any] = {**DEFAULTS, **config, "mixer": dict(config["mixer"])}
    for key, most in _MOST.items():
        check_count(f"model.{key}", plain[key], least=0 if key == "mlp_hidden" else 1, most=most)
    for key in ("tie_embeddings", "embed_norm"):
        if not isinstance(plain[key], bool):
            raise InputError(f"model.{key} must be true or false, got {plain[key]!r}.")
    for key in ("norm_eps", "embed_scale"):
        value = plain[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"model.{key} must be a number above 0, got {value!r}.")
    with convolutions_drawn_later():
        mixers = _mixers(plain)
    blocks = [
        Block(mixer, plain["d_model"], mlp_hidden=plain["mlp_hidden"], norm_eps=plain["norm_eps"]) for mixer in mixers
    ]
    model = LanguageModel(blocks, plain)
    model.draw_as_a_model()
    return model


def _mixers(config: dict[str, Any]) -> list[Mixer]:
    mixer = config["mixer"]
    pattern = mixer.get("pattern")
    a_list = isinstance(pattern, Sequence) and not isinstance(pattern, str)
    if not pattern or not a_list or "num_heads" not in mixer:
        raise InputError(
            f"mixer must hold `pattern`, a list of mixer names, and `num_heads`; got pattern {pattern!r} and "
            f"num_heads {mixer.get('num_heads')!r}. A model of one mixer has a pattern of one name, as [kda]."
        )
    if len(pattern) > _MOST["num_layers"]:
        raise InputError(
            f"mixer.pattern holds {len(pattern):,} names, expected at most {_MOST['num_layers']:,}, the most layers of "
            "a model: it is repeated over the layers, so give its names once."
        )
    unknown = set(mixer) - {"name", "pattern", "num_heads", *mixer_names()}
    if unknown:
        raise InputError(
            "mixer holds `pattern`, `num_heads`, a `name` for the record and options under the mixers' names "
            f"({', '.join(mixer_names())}); "
            f"unknown: {', '.join(sorted(unknown))}."
        )
    classes: dict[str, type[Mixer]] = {}
    for name in pattern:
        if not isinstance(name, str) or name not in classes:  # finding one lists the modules of the package
            classes[name] = find_mixer(name)
    backend = config["backend"]
    known_words = {name: ("auto",) if cls.op is None else available_backends(cls.op) for name, cls in classes.items()}
    known = {name: backend in words for name, words in known_words.items()}
    if not any(known.values()):
        words = sorted({word for found in known_words.values() for word in found})
        raise InputError(f"no mixer of {', '.join(classes)} has a backend {backend!r}; they have {', '.join(words)}.")
    layers = (pattern[i % len(pattern)] for i in range(config["num_layers"]))
    return [_mixer(name, classes[name], config, mixer, backend if known[name] else "auto") for name in layers]


def _mixer(name: str, cls: type[Mixer], config: dict[str, Any], mixer: dict[str, Any], backend: str) -> Mixer:
    options = {} if mixer.get(name) is None else mixer[name]
    if not isinstance(options, Mapping):
        raise InputError(f"mixer.{name} must hold the options of that mixer by name, got {options!r}.")
    options = dict(options)
    allowed = [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    takes_backend = "backend" in allowed
    allowed = [option for option in allowed if option != "backend"]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise InputError(f"mixer {name!r} has no option {', '.join(unknown)}; it has {', '.join(allowed)}.")
    check_types(cls, options, prefix=f"mixer.{name}.")
    if takes_backend:
        options["backend"] = backend
    return cls(config["d_model"], mixer["num_heads"], **options)
