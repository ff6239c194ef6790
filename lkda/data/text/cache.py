"""Cache entries on disk. An entry is named by a hash of its inputs, is complete or absent, and is built by one process
at a time."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lkda.checks import InputError

_METADATA_FILE, _METADATA = "metadata.json", "metadata"
_EARLIER = ("facts.json", "facts")  # the file and its entry in versions before
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def expanded(path: str) -> Path:
    """`path` with ~ replaced by the home directory. Raises InputError if the home directory is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"the home directory in {path} is not known: write the path in full.") from error


def nothing_found(pattern: str) -> str:
    """What is said of a path or a glob that no file matches: what is wrong, and what to give instead."""
    if glob.has_magic(pattern):
        return "matches no file: give a glob that matches some, or the path of a file or a directory."
    return "does not exist: give the path of a file or a directory, or a glob that matches some files."


@contextmanager
def building(entry: Path) -> Iterator[Path]:
    """Hold the entry's lock, for which other processes wait. Yields an empty directory to build in, which is removed at
    the end.

    Raises: InputError if the cache cannot be written.
    """
    scratch = entry.with_name(f".{entry.name}.building")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(entry.with_name(f".{entry.name}.lock"))
    except OSError as error:
        raise _not_writable(entry, error) from error
    try:
        try:
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
            scratch.mkdir()
        except OSError as error:
            raise _not_writable(entry, error) from error
        yield scratch
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _not_writable(entry, error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        entry.with_name(f".{entry.name}.lock").unlink(missing_ok=True)
        os.close(lock)


def _locked(path: Path) -> int:
    """A descriptor of the lock file `path`, with its lock held. The holder of the lock removes the file."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)  # the previous holder removed the file meanwhile


def _not_writable(entry: Path, error: OSError) -> InputError:
    return InputError(
        f"cannot write the cache {entry.parent}: {error.strerror}. Set data.cache_dir or LKDA_CACHE to a directory "
        "that can be written."
    )


def publish(built: Path, entry: Path, metadata: dict[str, Any]) -> None:
    """Write `metadata` into the finished directory `built` and rename it to `entry`. A broken entry is replaced."""
    sizes = {str(path.relative_to(built)): path.stat().st_size for path in built.rglob("*") if path.is_file()}
    (built / _METADATA_FILE).write_text(json.dumps({_METADATA: metadata, "sizes": sizes}), encoding="utf-8")
    if entry.exists():
        shutil.rmtree(entry)
    os.rename(built, entry)


def metadata_of(entry: Path) -> dict[str, Any] | None:
    """The metadata that was published with the entry. None if there is no entry, or a file in it has another size."""
    file, key = _EARLIER if (entry / _EARLIER[0]).is_file() else (_METADATA_FILE, _METADATA)
    try:
        record = json.loads((entry / file).read_text(encoding="utf-8"))
        metadata: dict[str, Any] = record[key]
        whole = all((entry / name).stat().st_size == size for name, size in record["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return metadata if whole else None
