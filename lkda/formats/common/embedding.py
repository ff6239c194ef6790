"""Folds the norm and the factor of an embedding into its table, because other tools only look embeddings up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lkda.formats.common.building import assign
from lkda.formats.common.writing import weights_of
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel

# The entry of config.json that says that this was done.
FOLDED = "lkda_folded_embedding"


def needs_folding(config: Mapping[str, Any]) -> bool:
    """Whether a model normalises or scales the embeddings that it looks up."""
    return bool(config["embed_norm"]) or config["embed_scale"] != 1.0


@torch.no_grad()
def folded(model: LanguageModel) -> LanguageModel:
    """A model that computes the same but only looks embeddings up; the model itself where it already does.

    The norm and the factor act on each token's embedding by itself, so the table can hold their result. The head keeps
    its weights and is no longer tied to the embedding.
    """
    config = model.config
    if not needs_folding(config):
        return model
    weights = weights_of(model)
    rows = torch.arange(config["vocab_size"], device=model.embed_tokens.weight.device)
    weights["embed_tokens.weight"] = model.embed(rows).cpu().float()
    weights.pop("embed_norm.weight", None)
    with torch.device("meta"):
        simpler = build_model({**config, "embed_norm": False, "embed_scale": 1.0, "tie_embeddings": False})
    return assign(simpler, weights).eval()
