"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from lkda.checks import InputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write into, which takes the place of `path` when the context ends.

    A reader, or a kill or a full disk at any moment, sees the old content or the new, never a part of it.

    Raises: OSError, naming `path`, where it cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except OSError as error:
        raise named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file at once, as `replacing` does; text in UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_together(files: Mapping[Path, str | bytes]) -> None:
    """Write several files, as `write_atomically` does; where one cannot be written, all stay as they were."""
    with ExitStack() as stack:
        for path, content in files.items():
            file = stack.enter_context(replacing(path))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the first takes its place


def replace_file(temporary: Path, path: Path) -> None:
    """Rename `temporary` over `path`, and make the rename itself survive a power cut."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def named(error: OSError, path: Path) -> OSError:
    """The same error with the file that the user knows; a write that fails names none."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def check_output_file(path: Path, *, option: str) -> None:
    """Raises ValueError where a file cannot be written to `path`, whose folder need not be there yet.

    Args:
        option: of the command line, that gave the path.
    """
    if path.is_dir():
        raise InputError(f"{option}={path} is a directory: give the name of a file in it.")
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    trial = folder / f".{os.getpid()}.tmp"
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"{option}={path} cannot be written: {folder}: {error.strerror}.") from error
