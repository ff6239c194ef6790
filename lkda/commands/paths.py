"""The paths in a run's configuration, made absolute when the run begins: then they mean the same from anywhere."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from typing import Any

from lkda.checks import InputError
from lkda.data.text.cache import expanded

# Options of data that are paths, or lists of paths.
_DATA_LISTS = ("paths", "val_paths", "test_paths")
_DATA_PATHS = (*_DATA_LISTS, "tokenizer_path", "cache_dir", "directory")
_PATTERN = re.compile(r"[*?[]")


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run with every path in it absolute, so that what is recorded means the same
    anywhere.

    Raises: ValueError for what is no path, or one in a home directory that is not known.
    """
    initial = settings["init_from"]
    return {
        **settings,
        "init_from": None if initial is None else _absolute(initial, "init_from"),
        "data": data_with_absolute_paths(settings["data"]),
    }


def data_with_absolute_paths(data: Mapping[str, Any]) -> dict[str, Any]:
    """The group `data`, likewise."""
    changed = dict(data)
    for name in _DATA_PATHS:
        value = data.get(name)
        if isinstance(value, list):
            changed[name] = [_absolute(item, f"data.{name}") for item in value]
        elif value is not None and name not in _DATA_LISTS:
            changed[name] = _absolute(value, f"data.{name}")
    # A data set of the hub, or a directory.
    of_the_hub = data.get("name")
    if isinstance(of_the_hub, str) and expanded(of_the_hub).is_dir():
        changed["name"] = _absolute(of_the_hub, "data.name")
    return changed


def _absolute(path: object, option: str) -> str:
    """`path` from the root on; a pattern is still a pattern, and means the same files."""
    if not isinstance(path, str) or not path:
        quoted = "" if isinstance(path, str) else f": a name that looks like a number needs quotes, '\"{path}\"'"
        raise InputError(f"{option} must be a path, got {path!r}{quoted}.")
    here = expanded(path)
    if here.is_absolute() or here.exists() or not _PATTERN.search(path):
        return str(here.absolute())
    return os.path.join(glob.escape(os.getcwd()), path)
