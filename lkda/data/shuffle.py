"""The order of an epoch: a pseudo-random permutation that is computed, not stored.

A Feistel network is a bijection of [0, 2^2b) for any round function. Applying it repeatedly until the value is below n
gives a permutation of [0, n). The row at any position of any epoch is therefore computed at the same cost and in O(1)
memory. It depends only on the seed, the epoch and the position, not on a library's random generator or on earlier
samples.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from lkda.checks import InputError

_ROUNDS = 6
# Places in which every source has exactly its share, rounded to a whole number.
CYCLE = 10_000


def permuted(places: np.ndarray, size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The images of `places` (int64, in [0, size)) under the permutation of [0, size) that (seed, epoch) selects."""
    bits = (max(size - 1, 1).bit_length() + 1) // 2
    keys = [_round_key(seed, epoch, index) for index in range(_ROUNDS)]
    image = _feistel(places.astype(np.uint64), bits, keys)
    while (outside := image >= size).any():
        image[outside] = _feistel(image[outside], bits, keys)
    return image.astype(np.int64)


def shuffled(places: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """The rows at `places` (int64, >= 0) of the unlimited sequence epoch 0, epoch 1, ..., each `size` rows long."""
    epochs, within = np.divmod(places, size)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = permuted(within[here], size, seed=seed, epoch=int(epoch))
    return rows


def weighted(places: np.ndarray, parts: Sequence[tuple[int, float]], *, seed: int) -> np.ndarray:
    """The rows at `places` (int64, >= 0) of an unlimited mixture of sources, of which each has its own epochs.

    Each CYCLE places are a cycle, in which every source has its share of the places, in an order that (seed, cycle)
    selects. The rows of a source follow each other as in `shuffled`: each is used once before any is used again.

    Args:
        parts: (number of rows, weight) of each source. The rows are numbered source by source.
    """
    counts = tuple(shares([weight for _, weight in parts]).tolist())
    firsts = np.cumsum([0, *(size for size, _ in parts)])
    cycles, within = np.divmod(places, CYCLE)
    rows = np.empty_like(places)
    for cycle in np.unique(cycles).tolist():
        sources, own = _cycle(counts, seed, cycle)
        for source, (size, _) in enumerate(parts):
            here = np.flatnonzero(cycles == cycle)
            here = here[sources[within[here]] == source]
            rows[here] = firsts[source] + shuffled(own[within[here]], size, seed=seed + source)
    return rows


@functools.lru_cache(maxsize=4)
def _cycle(counts: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The source at each place of a cycle, and how many places the source has before it, of all cycles. Both are int64
    [CYCLE]."""
    slots = permuted(np.arange(CYCLE), CYCLE, seed=seed, epoch=cycle)
    sources = np.searchsorted(np.cumsum(counts), slots, side="right")
    own = np.empty(CYCLE, dtype=np.int64)
    for source, count in enumerate(counts):
        here = np.flatnonzero(sources == source)
        own[here] = cycle * count + np.arange(count)
    return sources, own


def shares(weights: Sequence[float]) -> np.ndarray:
    """The number of places of each source in a cycle, int64, which add up to CYCLE.

    Raises: InputError for a weight that is not positive, or that is too small for a single place.
    """
    if any(not weight > 0 for weight in weights):
        raise InputError(f"weights must be positive, got {list(weights)}: leave a source out instead of a weight of 0.")
    parts = np.array(weights, dtype=np.float64) / max(weights)  # whose sum is finite
    exact = parts / parts.sum() * CYCLE
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: CYCLE - int(counts.sum())]] += 1
    if (counts == 0).any():
        raise InputError(f"weights {list(weights)} differ too much: each must be at least 1/{CYCLE} of their sum.")
    return counts


def _round_key(seed: int, epoch: int, index: int) -> np.uint64:
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _feistel(x: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A bijection of [0, 2^(2 bits)), elementwise on uint64."""
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return (left << half) | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014). Products wrap modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
