"""The sources of a prepared corpus, each with the part of a split that is of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lkda.checks import InputError


@dataclass(frozen=True)
class TextSource:
    """A source of a validation or test split.

    Attributes:
        name: of the source, such as "novels".
        begin, end: its tokens are those from `begin` to before `end`.
        bytes: UTF-8 bytes of its text.
    """

    name: str
    begin: int
    end: int
    bytes: int


def sources_of(directory: Path, split: str) -> list[TextSource]:
    """The sources of a split ("validation" or "test") of a corpus, in the order of their tokens.

    Returns: an empty list if the manifest of the corpus, which is of an earlier version, does not say where they are.
    Raises: InputError for a manifest that cannot be read.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        return []
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["sources"]
        found = []
        for source in listed:
            if split in source.get("tokens", ()):
                begin, end = source["tokens"][split]
                found.append(TextSource(source["name"], begin, end, source[f"{split}_bytes"]))
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no manifest of a prepared corpus ({error!r}): prepare it again.") from error
