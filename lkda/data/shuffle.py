"""The order of an epoch: a pseudo-random permutation that is computed, not stored.

A Feistel network is a bijection of [0, 2^2b) for any round function. Applying it repeatedly until the value is below n
gives a permutation of [0, n). The row at any position of any epoch is therefore computed at the same cost and in O(1)
memory. It depends only on the seed, the epoch and the position, not on a library's random generator or on earlier
samples.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6


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
