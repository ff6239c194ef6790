"""A token file: a .npy file of token ids that is written in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


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
