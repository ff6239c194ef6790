"""Small models for the tests, one for every mixer found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lkda.models import LanguageModel, build_model
from lkda.models.mixers import mixer_names

# Every mixer alone, and hybrids of those that carry a growing cache with those that carry a constant state.
PATTERNS = [*([name] for name in mixer_names()), ["kda", "kda", "kda", "mla"], ["simplified", "softmax"]]
IDS = ["_".join(pattern) for pattern in PATTERNS]
# Of what holds for any model whose mixers keep their contract: in CI these three, which have every mixer but conv.
IN_CI = ("kda", "kda_kda_kda_mla", "simplified_softmax")
FEW = [
    pytest.param(pattern, id=name, marks=() if name in IN_CI else pytest.mark.long)
    for pattern, name in zip(PATTERNS, IDS, strict=True)
]
assert set(IN_CI) <= set(IDS)


def config(pattern: list[str], **changes: Any) -> dict[str, Any]:
    plain = {
        "vocab_size": 50,
        "d_model": 32,
        "num_layers": len(pattern) if len(pattern) > 1 else 2,
        "mlp_hidden": 48,
        "mixer": {"pattern": pattern, "num_heads": 2},
    }
    return plain | changes


def small(pattern: list[str], *, scale: float = 5, **changes: Any) -> LanguageModel:
    """Seeded; weights `scale` times those at initialisation, so that a mistake in a mixer shows in the logits."""
    torch.manual_seed(0)
    model = build_model(config(pattern, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                p.mul_(scale)
    return model.eval()


def tokens(*shape: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
