"""Compiled kernels on disk: one file per entry, named by the hash of everything that it was compiled from.

Processes may share the directory: a file is written by an atomic rename and checked when it is read. If the directory
cannot be used, kernels are compiled again in each process, with one warning.
"""

import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

from lkda.io import default_cache_dir, write_atomically

_warned = False


def directory() -> Path:
    """The directory `kernels` of the cache. Raises InputError if there is no home directory for the cache."""
    return default_cache_dir() / "kernels"


def key(words: Iterable[str], texts: Iterable[bytes]) -> str:
    """A hash of options and sources. The length of each piece is hashed too, so that no two lists can collide."""
    digest = hashlib.sha256()
    for piece in (*(word.encode() for word in words), *texts):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:32]


def read(name: str) -> tuple[bytes, str] | None:
    """(cubin, log) of an entry, or None if it does not exist or is damaged."""
    try:
        head, _, cubin = (directory() / name).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        warn(error)
        return None
    try:
        metadata = json.loads(head)
        whole = hashlib.sha256(cubin).hexdigest() == metadata["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    return (cubin, metadata["log"]) if whole else None


def write(name: str, cubin: bytes, log: str) -> None:
    """Stores an entry. A failure gives a warning, no error."""
    head = json.dumps({"sha256": hashlib.sha256(cubin).hexdigest(), "log": log})
    try:
        directory().mkdir(parents=True, exist_ok=True)
        write_atomically(directory() / name, head.encode() + b"\n" + cubin)
    except OSError as error:
        warn(error)


def warn(error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the kernel cache {directory()} cannot be used ({error}); kernels are compiled again in every process; "
            "set LKDA_CACHE to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
