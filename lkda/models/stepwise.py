"""A language model that reads whole sequences one token at a time, as in decoding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.models.mixers import find_mixer
from lkda.ops.kda.state import STATE_DTYPES
from lkda.ops.sequences import lengths_of


class StepwiseModel(LanguageModel):
    """A model with the same weights that stores its state after every token. Only its rounding differs.

    Measuring this model instead of the original shows what a state of lower precision costs. The sequences of a batch
    are processed in parallel. There are no gradients.

    Args:
        model: its weights are copied.
        state_dtype: the dtype of the states of KDA layers; where None, that of `model`.

    Attributes:
        state_dtype: the dtype of the states of KDA layers; None where there are no such layers.
        on_step: called after every token, with the share of the batch's steps that it is.

    Raises: ValueError for an unknown dtype, or for any dtype where no layer has such a state.
    """

    def __init__(self, model: LanguageModel, *, state_dtype: str | None = None) -> None:
        config = model.config if state_dtype is None else _with_state_dtype(state_dtype, model.config)
        super().__init__(list(build_model(config).blocks), config)  # type: ignore[arg-type]
        self.to(model.embed_tokens.weight).eval().load_state_dict(model.state_dict())
        self.state_dtype = next((m.state_dtype for m in self.mixers() if hasattr(m, "state_dtype")), None)
        self.on_step: Callable[[float], None] = lambda share: None

    @torch.no_grad()
    def hidden(self, tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
        B, T = tokens.shape
        lengths = torch.tensor(lengths_of(B, T, cu_seqlens))
        starts = lengths.cumsum(0) - lengths
        # Sorted by decreasing length, so that the sequences that still have tokens are always the first ones.
        lengths, order = lengths.sort(descending=True, stable=True)
        starts, flat = starts[order].to(tokens.device), tokens.flatten()
        steps = int(lengths[0])
        alive = [int(n) for n in (lengths > torch.arange(steps).unsqueeze(1)).sum(1)]
        state, x = self.init_state(alive[0]), self.embed_tokens.weight.new_empty(B * T, self.config["d_model"])
        for t, count in enumerate(alive):
            if count < alive[t - 1]:
                state = [tuple(part[:count] for part in kept) for kept in state]
            places = starts[:count] + t
            x[places], state = self.hidden_step(flat[places], state)
            self.on_step(1 / steps)
        return x.view(B, T, -1)


def set_state_dtype(model: LanguageModel, state_dtype: str) -> None:
    """Let the KDA layers of `model` store their states in this dtype.

    Raises: ValueError for an unknown dtype, or where no layer has such a state.
    """
    config = _with_state_dtype(state_dtype, model.config)
    if state_dtype not in STATE_DTYPES:
        raise InputError(f"state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}.")
    model.config = config
    for mixer in model.mixers():
        if hasattr(mixer, "state_dtype"):
            setattr(mixer, "state_dtype", state_dtype)  # noqa: B010


def _with_state_dtype(state_dtype: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model, with this dtype for each of its mixers that has the option."""
    names = dict.fromkeys(config["mixer"]["pattern"])
    having = [name for name in names if "state_dtype" in inspect.signature(find_mixer(name)).parameters]
    if not having:
        raise InputError(
            f"state_dtype={state_dtype} is for models with KDA layers, and this one has {', '.join(names)}: "
            "leave it out."
        )
    changed = {name: {**(config["mixer"].get(name) or {}), "state_dtype": state_dtype} for name in having}
    return {**config, "mixer": {**config["mixer"], **changed}}
