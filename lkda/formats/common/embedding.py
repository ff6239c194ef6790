"""Embeddings that other tools look up as they are: the norm and the factor of ours, folded into the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lkda.formats.common.building import assign
from lkda.formats.common.writing import weights_of
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel

# In config.json: whether the table was changed so.
FOLDED = "lkda_folded_embedding"


def needs_folding(config: Mapping[str, Any]) -> bool:
    """Whether a model does more to a token's embedding than to look it up."""
    return bool(config["embed_norm"]) or config["embed_scale"] != 1.0


@torch.no_grad()
def folded(model: LanguageModel) -> LanguageModel:
    """The same function of the tokens by a model that only looks embeddings up; the model itself where it does so.

    What a token's embedding becomes is a function of the token alone, so its row of the table can hold that. The head
    keeps the weights it had, and is no longer tied.
    """
    config = model.config
    if not needs_folding(config):
        return model
    weights = weights_of(model)
    rows = torch.arange(config["vocab_size"], device=model.embed_tokens.weight.device)
    weights["embed_tokens.weight"] = model.embed(rows).cpu().float()
    weights.pop("embed_norm.weight", None)
    with torch.device("meta"):
        plain = build_model({**config, "embed_norm": False, "embed_scale": 1.0, "tie_embeddings": False})
    return assign(plain, weights).eval()
