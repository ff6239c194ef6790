"""Reads files of torch.save from anywhere: nothing in them is executed, and damage is found."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch

from lkda.checks import InputError

# What the system says of a file that may be whole: it is protected, or there is no memory or handle left.
_NOT_ITS_FAULT = (errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class UnreadableError(InputError):
    """A file cannot be read for a reason that is not in the file, which may be whole."""


def read_torch_file(path: Path, *, what: str, mmap: bool = False, advice: str = "") -> Any:
    """The content of a file of torch.save, on the CPU: tensors and plain values.

    Args:
        what: what the file should be, for the message: "a checkpoint".
        advice: what to do about a file that is not of this kind, a sentence for the message.
        mmap: whether the tensors stay in the file until they are used. Their bytes are then not checked.
    Raises: InputError if the file is truncated, changed in any byte that counts, compressed, or not of this kind;
        UnreadableError if this process cannot read it.
    """
    try:
        _check_archive(path, contents=not mmap)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types here (RuntimeError, EOFError, UnpicklingError, KeyError, ...)
        reason = _not_its_fault(error)
        if reason is not None:
            raise UnreadableError(f"{path} cannot be read: {reason}.") from error
        message = f"{path} is truncated or not {what} ({type(error).__name__} while reading it). {advice}"
        raise InputError(message.rstrip()) from error


def _not_its_fault(error: Exception) -> str | None:
    """Why a file cannot be read, if the reason is not in the file."""
    if isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT:
        return error.strerror
    no_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # torch has no type for it
    return "there is not enough memory" if no_memory else None


def _check_archive(path: Path, *, contents: bool) -> None:
    """Raises BadZipFile unless the zip archive is stored as torch stores it. torch does not compare the checksums that
    it writes. A compressed entry could be as large as memory, however small the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        damaged = archive.testzip() if contents else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is another")
