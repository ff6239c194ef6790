"""Which choices of a group of the configuration have a setting, for messages about choices that do not have it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lkda.shipped import CONFIGS


def choices_with(setting: str) -> list[str]:
    """The choices of a group that have a setting, as ["data=files", "data=hub"] for "data.test_paths".

    Args:
        setting: its dotted name, which begins with the group.
    """
    group, _, key = setting.partition(".")
    return [f"{group}={path.stem}" for path in sorted((CONFIGS / group).glob("*.yaml")) if _has(path, key)]


def _has(path: Path, key: str) -> bool:
    """Whether the file or one of its `defaults` of the same group has a key, dotted if it is inside another."""
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, Mapping):
        return False
    defaults = [name for name in content.get("defaults", ()) if isinstance(name, str) and name != "_self_"]
    return _inside(content, key) or any(_has(path.with_name(f"{name}.yaml"), key) for name in defaults)


def _inside(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True
