"""The computed order of an epoch."""

from __future__ import annotations

import numpy as np
import pytest

from lkda.data.shuffle import permuted, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_row_comes_once_an_epoch(size):
    for epoch in range(3):
        image = permuted(np.arange(size), size, seed=7, epoch=epoch)
        assert np.array_equal(np.sort(image), np.arange(size))


def test_it_is_the_same_everywhere():
    """Written down: a resumed run may meet another version of numpy."""
    assert permuted(np.arange(10), 10, seed=1, epoch=2).tolist() == [2, 1, 4, 7, 5, 9, 6, 8, 3, 0]
    assert permuted(np.array([0, 10**12 - 1]), 10**12, seed=1, epoch=2).tolist() == [212841392716, 377355902323]


def test_seeds_and_epochs_differ():
    orders = {tuple(permuted(np.arange(50), 50, seed=s, epoch=e).tolist()) for s in range(5) for e in range(5)}
    assert len(orders) == 25


def test_rows_are_spread_evenly():
    """Each place sees each row equally often: chi-squared of 16 x 16 counts, 225 degrees of freedom."""
    epochs = 2000
    counts = np.zeros((16, 16))
    for epoch in range(epochs):
        counts[np.arange(16), permuted(np.arange(16), 16, seed=0, epoch=epoch)] += 1
    expected = epochs / 16
    assert ((counts - expected) ** 2 / expected).sum() < 225 + 5 * (2 * 225) ** 0.5


def test_neighbours_are_torn_apart():
    image = permuted(np.arange(10000), 10000, seed=0, epoch=0)
    assert abs(np.corrcoef(np.arange(10000), image)[0, 1]) < 0.05
    assert (np.abs(np.diff(image)) == 1).mean() < 0.01


def test_epochs_follow_each_other_without_a_gap():
    rows = shuffled(np.arange(95), 10, seed=3)
    for epoch in range(9):
        assert sorted(rows[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert np.array_equal(shuffled(np.arange(40, 95), 10, seed=3), rows[40:])
