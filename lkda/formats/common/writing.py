"""Weights and JSON on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor

from lkda.formats.common.reading import WEIGHTS
from lkda.models.lm import LanguageModel

DTYPES = ("float32", "bfloat16")
# exp and softplus of these decide how long a head remembers; Kimi Linear's own checkpoints keep them whole too.
_FLOAT32 = ("A_log", "dt_bias")


def weights_of(model: LanguageModel) -> dict[str, Tensor]:
    """Every parameter by our name, on the CPU in float32; a tied head stands under both of its names."""
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in model.state_dict().items()}


def write_weights(directory: Path, weights: Mapping[str, Tensor], *, dtype: str) -> None:
    """model.safetensors, as `dtype` (float32 | bfloat16) but for A_log and dt_bias, which stay in float32."""
    rounded = {
        name: tensor if name.endswith(_FLOAT32) else tensor.to(getattr(torch, dtype)).clone()
        for name, tensor in weights.items()
    }
    # Written here rather than by safetensors, whose files only their owner can read.
    (directory / WEIGHTS).write_bytes(serialize(rounded, metadata={"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable JSON with a newline at its end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_json(directory: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json. `Tokenizer.save` would raise a bare Exception where the disk is full."""
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
