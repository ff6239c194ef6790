"""Makes the paths in a run's configuration absolute, so that they stay valid in any working directory."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from typing import Any

from lkda.checks import InputError
from lkda.data.text.cache import expanded

# Options of the group data that are paths, or lists of paths.
_DATA_LISTS = ("paths", "val_paths", "test_paths")
_DATA_PATHS = (*_DATA_LISTS, "tokenizer_path", "cache_dir", "directory")
_PATTERN = re.compile(r"[*?[]")


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run with absolute paths. The recorded configuration then stays valid in any
    working directory.

    Raises: InputError for a value that is not a path, or a path in an unknown home directory.
    """
    initial = settings["init_from"]
    return {
        **settings,
        "init_from": None if initial is None else _absolute(initial, "init_from"),
        "data": data_with_absolute_paths(settings["data"]),
    }


def data_with_absolute_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved group `data` with absolute paths."""
    changed = dict(data)
    for name in _DATA_PATHS:
        value = data.get(name)
        if isinstance(value, list):
            changed[name] = [_absolute(item, f"data.{name}") for item in value]
        elif value is not None and name not in _DATA_LISTS:
            changed[name] = _absolute(value, f"data.{name}")
    # The name of a data set on the hub, or a directory.
    of_the_hub = data.get("name")
    if isinstance(of_the_hub, str) and expanded(of_the_hub).is_dir():
        changed["name"] = _absolute(of_the_hub, "data.name")
    return changed


def _absolute(path: object, option: str) -> str:
    """`path` made absolute. A glob stays a glob that matches the same files."""
    if not isinstance(path, str) or not path:
        quoted = "" if isinstance(path, str) else f": a name that looks like a number needs quotes, '\"{path}\"'"
        raise InputError(f"{option} must be a path, got {path!r}{quoted}.")
    here = expanded(path)
    if here.is_absolute() or here.exists() or not _PATTERN.search(path):
        return str(here.absolute())
    return os.path.join(glob.escape(os.getcwd()), path)
