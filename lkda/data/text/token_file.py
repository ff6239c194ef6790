"""A token file: a .npy file of token ids that is written in parts."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

PART = 2**22  # tokens of a file that are in memory at a time


def parts_of(token_ids: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in parts of at most PART. A memory-mapped file is mapped anew for each part, so that the process does
    not hold more than a part of it."""
    for begin in range(0, len(token_ids), PART):
        count = min(PART, len(token_ids) - begin)
        if isinstance(token_ids, np.memmap) and isinstance(token_ids.base, mmap.mmap):  # all of a file, not a slice
            place = token_ids.offset + begin * token_ids.itemsize
            yield np.memmap(token_ids.filename, token_ids.dtype, mode="r", offset=place, shape=(count,))
        else:
            yield token_ids[begin : begin + count]


def positions_of(token_ids: np.ndarray, token: int) -> np.ndarray:
    """The positions of a token, int64 [N], in ascending order."""
    found, begin = [np.zeros(0, dtype=np.int64)], 0
    for part in parts_of(token_ids):
        found.append(begin + np.flatnonzero(part == token))
        begin += len(part)
    return np.concatenate(found)


@contextmanager
def writing_token_file(path: Path, dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that appends tokens to the array at `path`. The file is complete when the context ends."""
    count = 0

    def append(tokens: np.ndarray) -> None:
        nonlocal count
        file.write(tokens.astype(dtype, copy=False).tobytes())
        count += len(tokens)

    with open(path, "wb") as file:
        _write_header(file, dtype, 0)
        yield append
        file.seek(0)
        _write_header(file, dtype, count)


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    """Write the header of a .npy file. It has the same length for every count, because numpy reserves space for it."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    )
