"""What data are, whatever their path is: hashes of their content, kept with a run and compared on the next reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.words import as_bounded

# {"train", "validation", "test", "tokenizer": hexadecimal SHA-256}; "tokenizer" is None for tokens that are no text,
# and "test" is absent where there is no test split.
Fingerprint = Mapping[str, str | None]

NAMES = {
    "train": "the training data",
    "validation": "the validation data",
    "test": "the test data",
    "tokenizer": "the tokenizer",
}
_BEGINS = b"\xff"  # is in no UTF-8 text, so that where documents begin is hashed too
_AT_ONCE = 2**24  # tokens


def of_texts(texts: Iterable[str]) -> str:
    """Of documents, in their order."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(_BEGINS)
        digest.update(text.encode())
    return digest.hexdigest()


def of_arrays(*arrays: np.ndarray) -> str:
    """Of the values and shapes of whole numbers, a part of them in memory at a time."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} ".encode())
        flat = array.reshape(-1)
        for begin in range(0, len(flat), _AT_ONCE):
            digest.update(flat[begin : begin + _AT_ONCE].astype("<i8").tobytes())
    return digest.hexdigest()


def of_tokenizer(tokenizer: Tokenizer) -> str:
    """Of everything that a tokenizer.json says. One of an earlier version that trained today would be the same, but for
    the length of its words, is the same."""
    content = as_bounded(json.loads(tokenizer.to_str()))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs, as ["the training data", "the tokenizer"]. What either of the two does not know is left out."""
    known = [name for name in NAMES if before.get(name) is not None and now.get(name) is not None]
    return [NAMES[name] for name in known if before[name] != now[name]]


def in_words(names: Sequence[str]) -> str:
    """Names in a sentence: "the training data, the validation data and the tokenizer"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def check_same(expected: Fingerprint, found: Fingerprint, *, source: str) -> None:
    """Raises InputError, naming what differs, where data are not what a run was trained on.

    Args:
        expected: the fingerprint of the run, {} for one that has none.
        found: of the data that are here; what is not known yet is left out.
        source: what the data are called.
    """
    changed = differences(expected, found)
    if changed:
        raise InputError(
            f"the run cannot resume: {in_words(changed)} ({source}) are not those that it was trained with. "
            "Restore them, or begin a new run in another hydra.run.dir."
        )
