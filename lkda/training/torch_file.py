"""Reads files of torch.save from anywhere: nothing in them is executed, and damage is found."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from lkda.checks import InputError


def read_torch_file(path: Path, *, what: str, mmap: bool = False) -> Any:
    """The content of a file of torch.save, on the CPU: tensors and plain values.

    Args:
        what: what the file should be, for the message: "a checkpoint".
        mmap: whether the tensors stay in the file until they are used. Their bytes are then not checked.
    Raises: InputError if the file is truncated, changed in any byte that counts, compressed, or not of this kind.
    """
    try:
        _check_archive(path, contents=not mmap)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types here (RuntimeError, EOFError, UnpicklingError, KeyError, ...)
        raise InputError(f"{path} is truncated or not {what} ({type(error).__name__} while reading it).") from error


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
