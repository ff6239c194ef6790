"""Packed batches: boundaries, order, fixed shapes."""

from __future__ import annotations

import pickle
from itertools import islice

import numpy as np
import pytest

from lkda.data.packing import IGNORED, CountFrom, Rows, TrainingBatches, ValidationBatches

START = 0


def stream(*lengths: int) -> np.ndarray:
    """Documents of `lengths` tokens, START included; every other token is unique."""
    parts, following = [], 1
    for length in lengths:
        parts.append(np.array([START, *range(following, following + length - 1)], dtype=np.uint16))
        following += length - 1
    return np.concatenate(parts)


def test_targets_are_the_next_tokens_of_the_stream():
    tokens = stream(7, 5, 9)
    rows = Rows(tokens, context=4, start=START, partial=False)
    assert rows.count == 5
    for n in range(5):
        x, y = rows.row(n)
        assert x.tolist() == tokens[4 * n : 4 * n + 4].tolist()
        assert y.tolist() == tokens[4 * n + 1 : 4 * n + 5].tolist()


def test_sequences_begin_at_rows_and_at_documents():
    rows = Rows(stream(7, 5, 9), context=4, start=START, partial=False)
    batch = TrainingBatches(rows, batch_size=5, seed=0)[0]
    tokens, bounds = batch["tokens"][0], batch["cu_seqlens"]
    starts = {n for n in range(20) if n % 4 == 0 or tokens[n] == START}
    assert sorted(starts) == bounds[: len(starts)].tolist()
    assert set(bounds[len(starts) :].tolist()) == {20}
    assert batch["targets"].shape == (1, 20)


def test_shapes_never_change():
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    rows = Rows(stream(*lengths), context=16, start=START, partial=False)
    batches = TrainingBatches(rows, batch_size=3, seed=0)
    shapes = {tuple(tuple(x.shape) for x in batches[b].values()) for b in range(80)}
    assert len(shapes) == 1
    for b in range(80):
        bounds = batches[b]["cu_seqlens"]
        assert bounds[0] == 0
        assert bounds[-1] == 48
        assert (bounds.diff() >= 0).all()


def test_an_epoch_holds_every_row_once_and_the_next_another_order():
    rows = Rows(stream(101), context=10, start=START, partial=False)
    batches = TrainingBatches(rows, batch_size=2, seed=3)
    epochs = [[batches[b]["tokens"].view(2, 10)[:, 0].tolist() for b in range(5 * e, 5 * e + 5)] for e in (0, 1)]
    flat = [[first for batch in epoch for first in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == [10 * n for n in range(10)]
    assert flat[0] != flat[1]


def test_a_batch_depends_on_seed_and_number_alone():
    rows = Rows(stream(500), context=10, start=START, partial=False)
    one = TrainingBatches(rows, batch_size=4, seed=1)
    other = pickle.loads(pickle.dumps(TrainingBatches(rows, batch_size=4, seed=1)))
    straight = [one[b]["tokens"] for b in islice(CountFrom(0), 30)]
    resumed = [other[b]["tokens"] for b in islice(CountFrom(17), 13)]
    assert all((a == b).all() for a, b in zip(straight[17:], resumed))
    assert not (TrainingBatches(rows, batch_size=4, seed=2)[0]["tokens"] == straight[0]).all()


def test_ranks_share_out_what_one_process_sees():
    rows = Rows(stream(401), context=10, start=START, partial=False)
    whole = TrainingBatches(rows, batch_size=4, seed=0)
    parts = [TrainingBatches(rows, batch_size=2, seed=0, rank=rank, world_size=2) for rank in (0, 1)]
    for b in range(12):
        alone = whole[b]["tokens"].view(4, 10)
        shared = [part[b]["tokens"].view(2, 10) for part in parts]
        assert (alone[0::2] == shared[0]).all()
        assert (alone[1::2] == shared[1]).all()


@pytest.mark.parametrize("length", [31, 32, 33, 40])
def test_validation_asks_every_token_once(length):
    tokens = stream(length)
    rows = Rows(tokens, context=8, start=START, partial=True)
    batches = ValidationBatches(rows, batch_size=3)
    asked = [t for b in range(len(batches)) for t in batches[b]["targets"].flatten().tolist() if t != IGNORED]
    assert asked == tokens[1:].tolist()
    assert {batches[b]["tokens"].shape for b in range(len(batches))} == {(1, 24)}
    with pytest.raises(IndexError):
        batches[len(batches)]
