"""Sampling without replacement, for a whole batch at a time."""

from __future__ import annotations

import numpy as np


def distinct(rng: np.random.Generator, rows: int, count: int, *, low: int, high: int) -> np.ndarray:
    """[rows, count] int64 in [low, high). The numbers within a row are distinct, and all such rows are equally likely.

    Each row holds the first `count` distinct numbers of an unlimited uniform sequence.
    """
    assert 0 < count <= high - low
    sampled = rng.integers(low, high, (rows, count + count // 8 + 8))
    while True:
        order = np.argsort(sampled, axis=1, kind="stable")
        ordered = np.take_along_axis(sampled, order, axis=1)
        again = np.zeros_like(sampled, dtype=bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        if ((~again).sum(1) >= count).all():
            first = np.argsort(again, axis=1, kind="stable")[:, :count]
            return np.take_along_axis(sampled, first, axis=1)
        sampled = np.concatenate([sampled, rng.integers(low, high, sampled.shape)], axis=1)


def weighted(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """[rows, count] int64, indices of `weights`, sampled one after another without replacement in proportion to weight.

    Each index gets an exponential random time with rate w. The earliest time belongs to an index with probability w /
    sum, and the same holds for the next earliest time among the remaining indices.
    """
    rings = rng.standard_exponential((rows, len(weights))) / weights
    return np.argsort(rings, axis=1)[:, :count]
