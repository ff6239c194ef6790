"""Writes weights and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from tokenizers import Tokenizer
from torch import Tensor

from lkda.formats.common.reading import WEIGHTS
from lkda.models.lm import LanguageModel

DTYPES = ("float32", "bfloat16")
# The decay depends on exp and softplus of these. Kimi Linear's checkpoints hold them in float32 too.
_FLOAT32 = ("A_log", "dt_bias")


def weights_of(model: LanguageModel) -> dict[str, Tensor]:
    """All parameters by their names in lkda, on the CPU in float32. A tied head is included under its own name too."""
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in model.state_dict().items()}


def renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    """The name in a file of transformers or flash-linear-attention of a parameter of lkda.

    Args:
        names: parts of names: lkda's and the file's.
    """
    for lkda_name, stored_name in names:
        name = name.replace(lkda_name, stored_name)
    return name if name.startswith("lm_head") else f"model.{name}"


def write_weights(directory: Path, weights: Mapping[str, Tensor], *, dtype: str) -> None:
    """Writes model.safetensors in `dtype` (float32 | bfloat16), except for A_log and dt_bias, which stay float32."""
    rounded = {
        name: tensor if name.endswith(_FLOAT32) else tensor.to(getattr(torch, dtype)).clone()
        for name, tensor in weights.items()
    }
    # Not written by safetensors, because only the owner could read its files.
    (directory / WEIGHTS).write_bytes(serialize(rounded, metadata={"format": "pt"}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes indented JSON that ends with a newline."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_json(directory: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json. `Tokenizer.save` would raise a bare Exception where the disk is full."""
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
