"""Removes held-out text from the training text: drops every training paragraph that shares a run of tokens with the
validation text or the test text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.text.token_file import parts_of, writing_token_file
from lkda.data.text.tokenizer import document_start, vocabulary_rows

# The length in tokens of a run that counts as shared.
WINDOW = 32
# The hash of a window is the sum of its tokens times these weights, modulo 2^64. The weights are random odd numbers, so
# that different windows almost never have the same hash.
_WEIGHTS = np.random.default_rng(0).integers(2**63, size=WINDOW, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_LOW_BITS = np.uint64(2**24 - 1)


@dataclass
class Left:
    """The training text of a source: the bytes that were dropped, and the bytes and tokens that are left."""

    dropped_bytes: int = 0
    train_bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Decontamination:
    """How much was dropped, and how much overlap there was before and after.

    Attributes:
        sources: what is left of each source.
        before, after: the fraction of the windows of each held-out text that occur in the training text, by its name. A
            window is within one document.
        dropped_bytes, train_bytes: UTF-8 bytes of the whole training text that were dropped, and that are left.
    """

    before: dict[str, float]
    after: dict[str, float]
    sources: list[Left]

    @property
    def dropped_bytes(self) -> int:
        return sum(source.dropped_bytes for source in self.sources)

    @property
    def train_bytes(self) -> int:
        return sum(source.train_bytes for source in self.sources)


def decontaminate(
    train: Sequence[Path],
    held_out: Mapping[str, Path],
    filtered: Path,
    *,
    tokenizer: Tokenizer,
    progress: Progress,
) -> Decontamination:
    """Write `filtered`: the token files `train`, one after another, without the paragraphs that share WINDOW
    consecutive tokens with a held-out text.

    A paragraph ends at a blank line, or at the end of a line in a document without blank lines. Only the hashes of the
    held-out windows and one training document are in memory at a time. When a paragraph is dropped, its neighbors
    become adjacent, which may create a shared window again. `after` is therefore counted in the text that is left.

    Args:
        train: the token files of the training text, one for each source.
        held_out: token files by name, {"validation": ..., "test": ...}.
        filtered: the token file to write.
        tokenizer: the byte-level tokenizer of all these files.
    Raises: InputError if the tokenizer does not mark where documents begin.
    """
    start, letters = document_start(tokenizer), _Letters(tokenizer)
    if start is None:
        raise InputError("the tokenizer has no token that begins a document, such as <|endoftext|>: use another one.")
    windows = {name: _Windows(np.load(path, mmap_mode="r"), start) for name, path in held_out.items()}
    arrays = [np.load(path, mmap_mode="r") for path in train]
    task = progress.add_task(f"dropping what is also {' or '.join(held_out)}", total=sum(map(len, arrays)))
    before = {name: _Found(own) for name, own in windows.items()}
    sources = [Left() for _ in arrays]
    with writing_token_file(filtered, arrays[0].dtype) as write:
        for source, token_ids in zip(sources, arrays):
            for document in documents_of(token_ids, start):
                hashes = window_hashes(document)
                shared = np.unique(np.concatenate([found.among(hashes) for found in before.values()]))
                left = document[_kept_tokens(letters.breaks(document), shared, len(document))]
                size, left_size = letters.size(document), letters.size(left)
                if left_size:
                    write(left)
                    source.tokens += len(left)
                source.dropped_bytes += size - left_size
                source.train_bytes += left_size
                progress.advance(task, len(document))
    after = {name: _Found(own) for name, own in windows.items()}
    for document in documents_of(np.load(filtered, mmap_mode="r"), start):
        hashes = window_hashes(document)
        for found in after.values():
            found.among(hashes)
    progress.remove_task(task)
    shares = [{name: found.share() for name, found in side.items()} for side in (before, after)]
    return Decontamination(shares[0], shares[1], sources)


def documents_of(token_ids: np.ndarray, start: int) -> Iterator[np.ndarray]:
    """The documents in a sequence of tokens, each with the token `start` that begins it."""
    kept: list[np.ndarray] = []
    for part in parts_of(token_ids):
        begin = 0
        for end in np.flatnonzero(part == start).tolist():
            kept.append(part[begin:end])
            if any(map(len, kept)):
                yield np.concatenate(kept)
            kept, begin = [], end
        kept.append(part[begin:])
    if any(map(len, kept)):
        yield np.concatenate(kept)


def window_hashes(document: np.ndarray) -> np.ndarray:
    """The hashes of the windows that begin at each token of a document [N]: uint64, [max(0, N - WINDOW + 1)]."""
    count = max(0, len(document) - WINDOW + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset, weight in enumerate(_WEIGHTS):
        hashes += document[offset : offset + count].astype(np.uint64) * weight
    return hashes


class _Windows:
    """The distinct windows of a held-out text, and how often each one occurs."""

    def __init__(self, token_ids: np.ndarray, start: int) -> None:
        hashes = [window_hashes(document) for document in documents_of(token_ids, start)]
        self.hashes, self.counts = np.unique(np.concatenate(hashes), return_counts=True)
        # Whether any of them has these lowest bits. One look-up rules out almost every window of the training text.
        self.may_have = np.zeros(int(_LOW_BITS) + 1, dtype=bool)
        self.may_have[self.hashes & _LOW_BITS] = True


class _Found:
    """The windows of a held-out text that have been found in the training text."""

    def __init__(self, held_out: _Windows) -> None:
        self.held_out = held_out
        self.met = np.zeros(len(held_out.hashes), dtype=bool)

    def among(self, hashes: np.ndarray) -> np.ndarray:
        """The positions in a document where one of these windows begins, from the hashes of its windows."""
        known = self.held_out.hashes
        candidates = np.flatnonzero(self.held_out.may_have[hashes & _LOW_BITS])
        places = np.searchsorted(known, hashes[candidates])
        inside = places < len(known)
        candidates, places = candidates[inside], places[inside]
        same = known[places] == hashes[candidates]
        self.met[places[same]] = True
        return candidates[same]

    def share(self) -> float:
        """The fraction of the held-out windows that have been found."""
        counts = self.held_out.counts
        return float(counts[self.met].sum() / max(1, counts.sum()))


class _Letters:
    """The number of bytes and of newlines of each token's text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # The name of a byte-level token has one letter per byte. The token that begins a document has no text.
        tokens = [tokenizer.id_to_token(token) or "" for token in range(vocabulary_rows(tokenizer))]
        self.sizes = np.array([len(token) for token in tokens])
        self.sizes[document_start(tokenizer)] = 0
        self.newlines = np.array([len(token) * (set(token) == {_NEWLINE}) for token in tokens])

    def size(self, document: np.ndarray) -> int:
        """The UTF-8 bytes of a document."""
        return int(self.sizes[document].sum())

    def breaks(self, document: np.ndarray) -> np.ndarray:
        """The positions where a paragraph begins. The first one is after the token that begins the document."""
        newlines = self.newlines[document]
        ends = newlines > 0
        blank = (newlines > 1) | (ends & np.concatenate([[False], ends[:-1]]))
        found = np.flatnonzero(blank if blank.any() else ends) + 1
        return np.union1d([1], found[found < len(document)])


_NEWLINE = "Ċ"  # a newline in the byte-level alphabet


def _kept_tokens(breaks: np.ndarray, shared: np.ndarray, length: int) -> np.ndarray:
    """bool [length]: the tokens of a document that are kept.

    A paragraph is dropped if shared windows cover at least WINDOW // 2 of its tokens, or all of them. This removes a
    part of every shared window: if a window spans two paragraphs, one of them holds at least half of it, and if it
    spans more, it covers those in between completely.
    """
    # +1 where a shared window begins and -1 after its end. The running sum is above zero where a window covers a token.
    edges = np.zeros(length + 1, dtype=np.int64)
    np.add.at(edges, shared, 1)
    np.add.at(edges, shared + WINDOW, -1)
    covered = np.cumsum(edges[:-1]) > 0
    kept = np.ones(length, dtype=bool)
    for begin, end in zip(breaks, [*breaks[1:], length]) if len(shared) else ():
        kept[begin:end] = covered[begin:end].sum() < min(end - begin, WINDOW // 2)
    return kept
