"""The settings of a run's config.yaml by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys of an experiment that lkda.commands.sweeps.grid reads, or whose values other settings take. The last one is of
# earlier versions.
GRID_KEYS = ("estimate", "then", "sweeps", "values", "jobs_per_gpu")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of each setting that is no section."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
