"""Models, a tokenizer and tokens for the tests of formats."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lkda.data.text.tokenizer import train_tokenizer
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel

VOCAB = 320
HYBRID = ("kda", "kda", "kda", "mla")
TEXT = "The people of the United States, the Union and the states: so many of them! It's 1,790 words, naïve café."


@cache
def tokenizer() -> Tokenizer:
    """As lkda trains them."""
    return train_tokenizer([TEXT] * 9, VOCAB - 10)


def model(
    pattern: tuple[str, ...],
    *,
    head_dim: int = 16,
    scale: float = 1.0,
    seed: int = 0,
    outer: dict[str, object] | None = None,
    **options: object,
) -> LanguageModel:
    """Two heads, a layer for each name. `options` are the mixers', `outer` those of the model around them.

    With `scale` above 1 the matrices are larger than at a run's start, as they become by training, so that every layer
    is felt in the logits; norms and gates are moved off their first values.
    """
    torch.manual_seed(seed)
    mixer = {"name": "test", "pattern": list(pattern), "num_heads": 2, **options}
    sizes = {"vocab_size": VOCAB, "d_model": 2 * head_dim, "num_layers": len(pattern), "mlp_hidden": 48, "context": 512}
    made = build_model({**sizes, **(outer or {}), "mixer": mixer}).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if scale != 1 and "conv1d" not in name:
                weight.mul_(scale) if weight.dim() == 2 else weight.add_(0.2 * torch.randn_like(weight))
    return made


def tokens(length: int = 500) -> Tensor:
    """[1, length], a document."""
    drawn = torch.randint(1, VOCAB - 10, (1, length), generator=torch.Generator().manual_seed(1))
    drawn[0, 0] = 0
    return drawn


def logits(made: LanguageModel, given: Tensor) -> Tensor:
    """[T, vocab]"""
    with torch.inference_mode():
        return made(given)[0].clone()
