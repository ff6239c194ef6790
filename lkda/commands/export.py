"""Write a trained model into a directory that others load."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

import lkda
from lkda.commands.model_source import load_trained
from lkda.commands.settings import plain
from lkda.formats import find_format


def export(config: DictConfig) -> Path:
    """Export `ckpt` to `out` in `format`.

    Args:
        config: composed from configs/export.yaml.
    Returns: the directory.
    Raises:
        ValueError: an unknown format, an unusable checkpoint, an occupied or unwritable directory.
    """
    plain(config)
    find_format(config.format)
    trained = load_trained(config.ckpt)
    out = Path(config.out)
    lkda.export(trained.model, trained.tokenizer, out, format=config.format)
    console = Console(soft_wrap=True)
    console.print(f"{trained.path} -> {out} ({config.format})")
    if config.format == "lkda":
        console.print(f'in Python:  model, tokenizer = lkda.load("{out}")', highlight=False)
    return out
