"""Files: atomic writes, which write a file completely or not at all, and the directory of the caches."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from lkda.checks import InputError


def default_cache_dir() -> Path:
    """The directory LKDA_CACHE, or ~/.cache/lkda if it is not set. Raises InputError if neither is known."""
    given = os.environ.get("LKDA_CACHE")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "lkda"
    except RuntimeError as error:  # HOME is not set, and the system has no home directory for this user
        raise InputError(
            "there is no home directory for the cache: set LKDA_CACHE to a directory that can be written."
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write into, which takes the place of `path` when the context ends.

    A reader sees the old content or the new content, never a part of it. This also holds if the process is killed or
    the disk is full.

    Raises: OSError, naming `path`, if the file cannot be written. No temporary file is left behind.
    """
    # Not the process id: processes of two containers that share a disk may have the same one.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
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
    """Write a file atomically, as `replacing` does. Text is encoded as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_together(files: Mapping[Path, str | bytes]) -> None:
    """Write several files, as `write_atomically` does. If one of them cannot be written, all stay as they were."""
    with ExitStack() as stack:
        for path, content in files.items():
            file = stack.enter_context(replacing(path))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the first file is renamed


def replace_file(temporary: Path, path: Path) -> None:
    """Rename `temporary` over `path`, and sync the folder, so that the rename survives a power failure."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def named(error: OSError, path: Path) -> OSError:
    """The same error with the path that the user knows. The error of a failed write names no file."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def file_in_the_way(directory: Path) -> str | None:
    """For a message: which file does not allow `directory` to be one, itself or one of its parents, and what to do.
    None if there is no such file."""
    # os.path, because it answers for names that are too long too.
    nearest = next((path for path in (directory, *directory.parents) if os.path.exists(path)), None)
    if nearest is None or os.path.isdir(nearest):
        return None
    return f"{nearest} is a file, and a directory is expected. Choose another directory."


def check_output_file(path: Path, *, option: str) -> None:
    """Raises InputError if a file cannot be written to `path`. Its folder need not exist yet.

    Args:
        option: the command-line option that gave the path.
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
