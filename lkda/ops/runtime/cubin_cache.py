"""Compiled kernels on disk: one file an entry, named by the hash of all that went into it.

Many processes may share the folder: a file appears whole, by an atomic rename, and is checked when read. A folder that
cannot be used costs compiling again, and one warning.
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from lkda.checks import InputError

_warned = False


def directory() -> Path:
    """The kernels' folder in LKDA_CACHE, or in ~/.cache/lkda. Raises ValueError where neither is known."""
    given = os.environ.get("LKDA_CACHE")
    try:
        return (Path(given) if given else Path.home() / ".cache" / "lkda") / "kernels"
    except RuntimeError as error:  # HOME is not set, and the system knows no home of this user
        raise InputError(
            "there is no home directory to keep compiled kernels in: set LKDA_CACHE to a directory that can be written."
        ) from error


def key(words: Iterable[str], texts: Iterable[bytes]) -> str:
    """Hash of options and sources; each is preceded by its length, so that no two lists collide by concatenation."""
    digest = hashlib.sha256()
    for piece in (*(word.encode() for word in words), *texts):
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:32]


def read(name: str) -> tuple[bytes, str] | None:
    """(cubin, log) of an entry, or None where there is none or it is damaged."""
    try:
        head, _, cubin = (directory() / name).read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(error)
        return None
    try:
        facts = json.loads(head)
        whole = hashlib.sha256(cubin).hexdigest() == facts["sha256"]
    except (ValueError, KeyError, TypeError):
        whole = False
    return (cubin, facts["log"]) if whole else None


def write(name: str, cubin: bytes, log: str) -> None:
    """Store an entry; failing to is no error."""
    head = json.dumps({"sha256": hashlib.sha256(cubin).hexdigest(), "log": log})
    temporary = None
    try:
        directory().mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=directory(), prefix=".")
        with os.fdopen(descriptor, "wb") as file:
            file.write(head.encode() + b"\n" + cubin)
        os.replace(temporary, directory() / name)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _warn(error)


def _warn(error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the kernel cache {directory()} cannot be used ({error}); kernels are compiled anew in every process; "
            "set LKDA_CACHE to a writable folder",
            RuntimeWarning,
            stacklevel=2,
        )
