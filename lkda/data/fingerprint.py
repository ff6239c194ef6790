"""Identifies data by hashes of their content, independent of their path. A run records them, and compares them when it
is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.words import as_bounded

# {"train", "validation", "test", "tokenizer": hexadecimal SHA-256}. "tokenizer" is None for tokens that are not text,
# and "test" is absent if there is no test split.
Fingerprint = Mapping[str, str | None]

NAMES = {
    "train": "the training data",
    "validation": "the validation data",
    "test": "the test data",
    "tokenizer": "the tokenizer",
}
_BEGINS = b"\xff"  # occurs in no UTF-8 text, so that the beginnings of documents are hashed too
_AT_ONCE = 2**24  # tokens


def of_texts(texts: Iterable[str]) -> str:
    """The hash of documents in their order."""
    return of_documents([text] for text in texts)


def of_documents(documents: Iterable[Iterable[str]]) -> str:
    """The hash of documents in their order. Each one is given as blocks of text that follow each other."""
    digest = hashlib.sha256()
    for blocks in documents:
        digest.update(_BEGINS)
        for block in blocks:
            digest.update(block.encode())
    return digest.hexdigest()


def of_arrays(*arrays: np.ndarray) -> str:
    """The hash of the values and shapes of integer arrays. Only a part of them is in memory at a time."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} ".encode())
        flat = array.reshape(-1)
        for begin in range(0, len(flat), _AT_ONCE):
            digest.update(flat[begin : begin + _AT_ONCE].astype("<i8").tobytes())
    return digest.hexdigest()


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """The hash of the content of a tokenizer.json. A tokenizer of an earlier version, whose words have no maximum
    length, has the same hash as the same tokenizer with that maximum."""
    content = as_bounded(json.loads(tokenizer.to_str()))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs, as ["the training data", "the tokenizer"]. Entries that one of the two lacks are not compared."""
    known = [name for name in NAMES if before.get(name) is not None and now.get(name) is not None]
    return [NAMES[name] for name in known if before[name] != now[name]]


def in_words(names: Sequence[str]) -> str:
    """The names as a phrase: "the training data, the validation data and the tokenizer"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def check_same(expected: Fingerprint, found: Fingerprint, *, source: str) -> None:
    """Raises InputError, naming the differences, if data are not those that a run was trained on.

    Args:
        expected: the fingerprint of the run; {} if it has none.
        found: the fingerprint of the data. Entries that are not known yet are left out.
        source: the name of the data.
    """
    changed = differences(expected, found)
    if changed:
        raise InputError(
            f"the run cannot be resumed: {in_words(changed)} ({source}) must be the same as before, but differ. "
            "Restore the old content, or begin a new run in another hydra.run.dir."
        )
