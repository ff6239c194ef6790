"""Reads the small files that describe a run or a model: JSON, YAML and CSV. They may come from a stranger, and none of
them may fill the memory or be read without an end."""

from __future__ import annotations

import re
import stat
from itertools import accumulate
from pathlib import Path

import yaml

from lkda.checks import InputError

# The largest that lkda itself writes, or that is known of other programs, have about 40 MB.
MOST_BYTES = 2**26
# YAML is read slowly: a million characters take half a minute, and values inside each other the square of their number.
MOST_YAML, MOST_DEPTH = 2**20, 100
# The one in C, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_record(path: Path, *, most: int = MOST_BYTES) -> None:
    """Raises InputError unless `path` is a file of at most `most` bytes; OSError if there is none."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is not a file: a pipe or a device may have no end.")
    if found.st_size > most:
        raise InputError(f"{path} has {found.st_size:,} bytes, but such a file has at most {most:,}.")


def read_record(path: Path, *, most: int = MOST_BYTES) -> str:
    """The text of a file. Raises InputError as `check_record`, and OSError or UnicodeDecodeError if it is no text."""
    check_record(path, most=most)
    return path.read_text(encoding="utf-8")


def check_yaml(text: str, *, source: object) -> None:
    """Raises InputError for YAML that lkda does not write, and that takes very long to read or fills the memory: with
    more than MOST_YAML characters, with more than MOST_DEPTH values inside each other, or with a value that is repeated
    elsewhere by its name. Raises yaml.YAMLError for text that is not YAML.

    Args:
        source: the file, for the message.
    """
    if len(text) > MOST_YAML:
        raise InputError(f"{source} has {len(text):,} characters, but YAML of lkda has at most {MOST_YAML:,}.")
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    if max(accumulate(steps), default=0) > MOST_DEPTH:
        raise InputError(f"{source} has more than {MOST_DEPTH} values inside each other.")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
        raise InputError(f"{source} refers to its own values (*name), which no file of lkda does.")
