"""Drawing without replacement, a whole batch at a time."""

from __future__ import annotations

import numpy as np


def distinct(rng: np.random.Generator, rows: int, count: int, *, low: int, high: int) -> np.ndarray:
    """[rows, count] int64 of [low, high), no number twice in a row, every such row equally likely.

    The first `count` different numbers of an unlimited uniform sequence.
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
    """[rows, count] indices of `weights`, sampled one by one without replacement, each in proportion to its weight.

    An exponential clock of rate w rings first with probability w / sum, and again so among those that are left.
    """
    rings = rng.standard_exponential((rows, len(weights))) / weights
    return np.argsort(rings, axis=1)[:, :count]
