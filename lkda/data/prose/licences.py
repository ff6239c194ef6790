"""Finds the licence of a package: its licence files, and the line that names the licence."""

from __future__ import annotations

import re
import shutil
from email.parser import HeaderParser
from pathlib import Path

from lkda.checks import InputError

# The licence files of a wheel: its metadata, and the licence texts beside it.
_WHEEL = re.compile(r".*\.dist-info/(METADATA|(.*/)?(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|CREDITS)[^/]*)", re.IGNORECASE)


def copy_licences(unpacked: Path, package: str, folder: Path) -> list[Path]:
    """Copy a package's licence files into `folder`, a new directory. Returns the copies.

    Raises: InputError if the package has none.
    """
    debian = unpacked / "usr" / "share" / "doc" / package / "copyright"
    files = (
        [debian] if debian.is_file() else [path for path in sorted(unpacked.rglob("*")) if _of_wheel(path, unpacked)]
    )
    if not files:
        raise InputError(
            f"{package} has no licence file, neither *.dist-info/METADATA nor copyright in usr/share/doc: leave it out."
        )
    folder.mkdir(parents=True)
    return [Path(shutil.copyfile(path, folder / path.name)) for path in files]


def _of_wheel(path: Path, unpacked: Path) -> bool:
    return path.is_file() and _WHEEL.fullmatch(str(path.relative_to(unpacked))) is not None


def stated_licence(files: list[Path]) -> str | None:
    """The licence that the package states, which may be that of its code only. None if no line states a licence."""
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name == "METADATA":
            headers = HeaderParser().parsestr(text)
            return headers["License-Expression"] or headers["License"]
        if path.name == "copyright" and (found := _OF_ALL_FILES.search(text)):
            return found[1].strip()
    return None


# The paragraph about all files in a machine-readable debian/copyright.
_OF_ALL_FILES = re.compile(r"^Files: \*\n(?:.+\n)*?License: (.+)$", re.MULTILINE)
