"""Composes the scripts' configurations for runs of seconds."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tests.commands import compositions

ROOT = Path(__file__).parents[2]
compositions.remember(str(ROOT / "configs"))
# Columns of metrics.csv that depend on the clock.
TIMES = ("seconds", "tokens_per_s", "tflops_per_s")


def small_run(corpus: Path, *overrides: str) -> list[str]:
    """Overrides of scripts/train.py for a few steps of a very small model on `corpus`, on the CPU."""
    return ["debug=fast", "data=files", f"data.paths=[{corpus}]", "trainer=cpu", *overrides]


@cache  # composing takes about as long as such a run
def composed(name: str, *overrides: str) -> DictConfig:
    """The configuration of a script, as its command line would compose it. Nobody changes it."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def rows(directory: Path) -> list[dict[str, str]]:
    """metrics.csv of a run without the columns that depend on the clock."""
    with open(directory / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
