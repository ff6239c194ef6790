"""Messages for overrides that do not fit a list or a mapping of the configuration, in place of Hydra's own, and for
several values without a sweep."""

from __future__ import annotations

import re

from hydra.errors import OverrideParseException
from omegaconf import ListConfig
from omegaconf.errors import ConfigIndexError, ConfigTypeError

_EXAMPLE = "as in data.train.0.pairs=5 for the first entry"
_NO_NUMBER = re.compile(r"Index '.*' \(str\) is not an int|invalid literal for int")
_SEVERAL = re.compile(r"Ambiguous value for argument '(?P<key>.*?)=(?P<values>.*)'")
_IN_BRACKETS = re.compile(r"\[(\d+)\]")


def list_entry_message(error: Exception) -> str | None:
    """The message for an error of Hydra or OmegaConf about a list, a mapping or several values; None for any
    other error."""
    if isinstance(error, OverrideParseException):
        return _of_brackets(str(error.override))
    text = str(error)
    if (several := _SEVERAL.match(text)) is not None:
        key, values = several.groups()
        return (
            f"{key}={values} has several values: add -m in front of it to train with each of them, or put them into "
            f"brackets if they are one list, {key}='[{values}]'."
        )
    if isinstance(error, TypeError | ValueError) and _NO_NUMBER.match(text):
        found = re.findall(r"'(.*?)'", text)
        return f"{found[0]!r} is not the number of an entry of a list: entries are numbered from 0, {_EXAMPLE}."
    cause = error.__cause__
    if isinstance(cause, ConfigIndexError) and isinstance(cause.parent_node, ListConfig):
        return f"there is no {cause.full_key}: the list has {len(cause.parent_node)}, numbered from 0."
    if isinstance(cause, ConfigTypeError) and "Cannot merge DictConfig with ListConfig" in str(cause):
        return _of_kind(str(error), key=str(cause.full_key), wants_list=cause.object_type is list)
    return None


def _of_brackets(override: str) -> str | None:
    key, equals, value = override.partition("=")
    if not equals or not _IN_BRACKETS.search(key):
        return None
    dots = _IN_BRACKETS.sub(r".\1", key)
    return f"{key} is not a setting: an entry of a list is named with dots, as in {dots}={value}"


def _of_kind(text: str, *, key: str, wants_list: bool) -> str:
    given = text.removeprefix("Error merging override ").partition("=")[2]
    if wants_list:
        return f"{key} must be a list, got {given}: put it into brackets, {key}='[{given}]'."
    return f"{key} must hold names with values as in {{name: value}}, got {given}."
