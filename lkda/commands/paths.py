"""The paths in a run's configuration, made absolute when the run begins: then they mean the same from anywhere."""

from __future__ import annotations

import copy
import glob
import os
import re

from omegaconf import DictConfig, ListConfig, OmegaConf

from lkda.checks import InputError
from lkda.data.text.cache import expanded

# Options of data that are paths, or lists of paths.
_DATA_LISTS = ("paths", "val_paths", "test_paths")
_DATA_PATHS = (*_DATA_LISTS, "tokenizer_path", "cache_dir", "directory")
_PATTERN = re.compile(r"[*?[]")


def with_absolute_paths(config: DictConfig) -> DictConfig:
    """The configuration of a run with every path in it absolute, so that what is recorded means the same anywhere.

    Raises: ValueError for what is no path, or one in a home directory that is not known.
    """
    changed = copy.deepcopy(config)
    if changed.init_from is not None:
        changed.init_from = _absolute(changed.init_from, "init_from")
    changed.data = data_with_absolute_paths(changed.data)
    return changed


def data_with_absolute_paths(config: DictConfig) -> DictConfig:
    """The group `data`, likewise."""
    data = copy.deepcopy(config)
    for name in _DATA_PATHS:
        value = OmegaConf.select(data, name, throw_on_missing=False)
        if isinstance(value, ListConfig):
            data[name] = [_absolute(item, f"data.{name}") for item in value]
        elif value is not None and name not in _DATA_LISTS:
            data[name] = _absolute(value, f"data.{name}")
    # A data set of the hub, or a directory.
    name = OmegaConf.select(data, "name", throw_on_missing=False)
    if isinstance(name, str) and expanded(name).is_dir():
        data.name = _absolute(name, "data.name")
    return data


def _absolute(path: object, option: str) -> str:
    """`path` from the root on; a pattern is still a pattern, and means the same files."""
    if not isinstance(path, str) or not path:
        quoted = "" if isinstance(path, str) else f": a name that looks like a number needs quotes, '\"{path}\"'"
        raise InputError(f"{option} must be a path, got {path!r}{quoted}.")
    here = expanded(path)
    if here.is_absolute() or here.exists() or not _PATTERN.search(path):
        return str(here.absolute())
    return os.path.join(glob.escape(os.getcwd()), path)
