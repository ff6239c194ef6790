"""Reads token files of other programs: .npy arrays, and .bin files of bare numbers."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lkda.checks import InputError
from lkda.data.text.cache import expanded, nothing_found
from lkda.data.text.token_file import parts_of

SUFFIXES = (".npy", ".bin")
DTYPES = ("uint16", "uint32", "int32", "int64")
# A .bin file of llm.c begins with 256 numbers of 32 bits: one of these, a version, and the number of tokens. The first
# is for the tokens of GPT-2, the second for those of Llama 3.
_LLM_C: dict[int, tuple[int, np.dtype]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
_LLM_C_HEADER = 1024
# The first numbers of a .bin file without a header, from which a wrong type is recognized.
_SAMPLE, _LEAST = 2**16, 16


@dataclass(frozen=True)
class Shard:
    """A token file. `token_ids` [N] is memory-mapped."""

    path: Path
    token_ids: np.ndarray


def shard_paths(patterns: Sequence[str], *, option: str) -> list[Path]:
    """The files of paths, directories and globs, in the order of the patterns and then of their names.

    Args:
        option: the option that gave the patterns, for messages.
    Raises: InputError for a path that does not exist or is not a token file, or a file that is given twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        literal = expanded(pattern)
        matches = [literal] if literal.exists() else [Path(match) for match in sorted(glob.glob(str(literal)))]
        if not matches:
            raise InputError(f"{option}: {pattern} {nothing_found(pattern)}")
        for match in matches:
            inside = sorted(path for path in match.iterdir() if path.suffix in SUFFIXES) if match.is_dir() else [match]
            wrong = [path for path in inside or [match] if path.suffix not in SUFFIXES]
            if wrong:
                raise InputError(f"{option}: {wrong[0]} is not a token file, which ends in {' or '.join(SUFFIXES)}.")
            found += inside
    twice = [path for path in found if found.count(path) > 1]
    if twice:
        raise InputError(f"{option}: {twice[0]} is given twice.")
    return found


def load_shard(path: Path, *, dtype: str) -> Shard:
    """Map a token file. An array of several dimensions is read row by row.

    Args:
        dtype: of the numbers in a .bin file without a header, one of DTYPES.
    Raises: InputError for a file that cannot be read, or that does not hold whole numbers.
    """
    try:
        token_ids = np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else _bare(path, dtype)
    except InputError:
        raise
    except Exception as error:  # numpy reads the header as Python's literals, which raise many types
        raise InputError(f"{path} is not a token file that can be read: {' '.join(str(error).split())}.") from error
    if token_ids.dtype.kind not in "iu":
        raise InputError(f"{path} must hold whole numbers, got {token_ids.dtype}.")
    if token_ids.size == 0:
        raise InputError(f"{path} holds no tokens.")
    return Shard(path, token_ids.reshape(-1))


def _bare(path: Path, dtype: str) -> np.ndarray:
    """The numbers of a .bin file, little-endian."""
    size, kind = path.stat().st_size, np.dtype(dtype).newbyteorder("<")
    with open(path, "rb") as file:
        header = file.read(_LLM_C_HEADER)
    first = int(np.frombuffer(header, "<i4", 1)[0]) if len(header) == _LLM_C_HEADER else 0
    if first in _LLM_C:
        version, count = (int(number) for number in np.frombuffer(header, "<i4", 3)[1:])
        known, kind = _LLM_C[first]
        if version != known or size != _LLM_C_HEADER + count * kind.itemsize:
            raise InputError(
                f"{path} has the header of llm.c, but not version {known} with {count} tokens of {8 * kind.itemsize} "
                "bits."
            )
        return np.memmap(path, kind, mode="r", offset=_LLM_C_HEADER) if count else np.zeros(0, kind)
    if size % kind.itemsize:
        raise InputError(f"{path} has {size} bytes, which is not a multiple of {kind.itemsize}: set data.dtype.")
    found = np.memmap(path, kind, mode="r") if size else np.zeros(0, kind)
    _check_width(found[:_SAMPLE], path)
    return found


def _check_width(numbers: np.ndarray, path: Path) -> None:
    """Raises InputError for numbers that were written with twice as many bits or more: then every second one is 0."""
    if len(numbers) >= _LEAST and not numbers[1::2].any() and numbers[::2].any():
        bits = 8 * numbers.itemsize
        raise InputError(
            f"every second number of {path} is 0, so its numbers have more than {bits} bits: set data.dtype, for "
            f"example data.dtype={'uint32' if bits == 16 else 'int64'}."
        )


def check_tokens(shard: Shard, *, rows: int) -> None:
    """Raises InputError for a token outside [0, rows)."""
    begin = 0
    for part in parts_of(shard.token_ids):
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            place = begin + int(np.flatnonzero(part == wrong)[0])
            raise InputError(
                f"{shard.path} has the token {wrong} at position {place}, but the tokenizer has {rows} tokens: give "
                "the tokenizer of these tokens, or the right data.dtype."
            )
        begin += len(part)


def hash_of_files(shards: Sequence[Shard]) -> str:
    """A hash of the content of token files in their order."""
    digest = hashlib.sha256()
    for shard in shards:
        with open(shard.path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
