"""What a package says of its licence: the files that say it, and the line that names it."""

from __future__ import annotations

import re
import shutil
from email.parser import HeaderParser
from pathlib import Path

from lkda.checks import InputError

# Of a wheel: its metadata, and the texts beside it. Of a Debian package: its copyright file.
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
            f"{package} holds no licence: neither *.dist-info/METADATA nor copyright in usr/share/doc; leave it out."
        )
    folder.mkdir(parents=True)
    return [Path(shutil.copyfile(path, folder / path.name)) for path in files]


def _of_wheel(path: Path, unpacked: Path) -> bool:
    return path.is_file() and _WHEEL.fullmatch(str(path.relative_to(unpacked))) is not None


def stated_licence(files: list[Path]) -> str | None:
    """The licence that the package names for itself, which may be that of its code alone; None where no line does."""
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name == "METADATA":
            headers = HeaderParser().parsestr(text)
            return headers["License-Expression"] or headers["License"]
        if path.name == "copyright" and (found := _OF_ALL_FILES.search(text)):
            return found[1].strip()
    return None


# The paragraph on all files, in the machine-readable form of debian/copyright.
_OF_ALL_FILES = re.compile(r"^Files: \*\n(?:.+\n)*?License: (.+)$", re.MULTILINE)
