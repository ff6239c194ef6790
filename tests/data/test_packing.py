"""Packed batches: boundaries, order, fixed shapes."""

from __future__ import annotations

import numpy as np
import pytest

from lkda.data.packing import Rows, TrainingBatches, ValidationBatches, cu_seqlens_length
from lkda.targets import IGNORE_INDEX

START = 0


def stream(*lengths: int) -> np.ndarray:
    """Documents of `lengths` tokens, START included; every other token is unique."""
    parts, following = [], 1
    for length in lengths:
        parts.append(np.array([START, *range(following, following + length - 1)], dtype=np.uint16))
        following += length - 1
    return np.concatenate(parts)


def rows_of(tokens: np.ndarray, *, context: int, partial: bool) -> Rows:
    return Rows(tokens, starts=np.flatnonzero(tokens == START), context=context, partial=partial)


def training(rows: Rows, *, batch_size: int, **options: int) -> TrainingBatches:
    length = cu_seqlens_length([rows], batch_size=batch_size)
    return TrainingBatches(rows, **{"batch_size": batch_size, "cu_seqlens_length": length, "seed": 0, **options})


def test_targets_are_the_next_tokens_of_the_stream():
    tokens = stream(7, 5, 9)
    rows = rows_of(tokens, context=4, partial=False)
    assert rows.count == 5
    for n in range(5):
        x, y = rows.row(n)
        assert x.tolist() == tokens[4 * n : 4 * n + 4].tolist()
        assert y.tolist() == tokens[4 * n + 1 : 4 * n + 5].tolist()


def test_sequences_begin_at_rows_and_at_documents():
    rows = rows_of(stream(7, 5, 9), context=4, partial=False)
    batch = training(rows, batch_size=5)[0]
    tokens, bounds = batch["tokens"][0], batch["cu_seqlens"]
    starts = {n for n in range(20) if n % 4 == 0 or tokens[n] == START}
    assert sorted(starts) == bounds[: len(starts)].tolist()
    assert set(bounds[len(starts) :].tolist()) == {20}
    assert batch["targets"].shape == (1, 20)


def test_training_and_validation_have_one_shape():
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    train = rows_of(stream(*lengths), context=16, partial=False)
    validation = rows_of(stream(*[3] * 40), context=16, partial=True)
    length = cu_seqlens_length([train, validation], batch_size=3)
    batches = TrainingBatches(train, batch_size=3, cu_seqlens_length=length, seed=0)
    fixed = ValidationBatches(validation, batch_size=3, cu_seqlens_length=length)
    all_batches = [batches[b] for b in range(80)] + [fixed[b] for b in range(len(fixed))]
    assert {tuple(tuple(x.shape) for x in batch.values()) for batch in all_batches} == {((1, 48), (1, 48), (length,))}
    for batch in all_batches:
        bounds = batch["cu_seqlens"]
        assert bounds[0] == 0
        assert bounds[-1] == 48
        assert (bounds.diff() >= 0).all()


def test_a_batch_may_hold_more_rows_than_the_stream():
    rows = rows_of(stream(3, 3, 3, 3, 5), context=8, partial=False)
    bounds = training(rows, batch_size=5)[0]["cu_seqlens"]
    assert bounds[-1] == 40
    assert (bounds.diff() > 0).sum() == 5 * 3  # in both of the rows two documents begin


def test_an_epoch_holds_every_row_once_and_the_next_another_order():
    rows = rows_of(stream(101), context=10, partial=False)
    batches = training(rows, batch_size=2, seed=3)
    epochs = [[batches[b]["tokens"].view(2, 10)[:, 0].tolist() for b in range(5 * e, 5 * e + 5)] for e in (0, 1)]
    flat = [[first for batch in epoch for first in batch] for epoch in epochs]
    assert sorted(flat[0]) == sorted(flat[1]) == [10 * n for n in range(10)]
    assert flat[0] != flat[1]


def test_a_batch_depends_on_seed_and_number_alone():
    rows = rows_of(stream(500), context=10, partial=False)
    straight = [training(rows, batch_size=4, seed=1)[b]["tokens"] for b in range(30)]
    backwards = training(rows, batch_size=4, seed=1)
    assert all((straight[b] == backwards[b]["tokens"]).all() for b in reversed(range(30)))
    assert not (training(rows, batch_size=4, seed=2)[0]["tokens"] == straight[0]).all()


def test_ranks_share_out_what_one_process_sees():
    rows = rows_of(stream(401), context=10, partial=False)
    whole = training(rows, batch_size=4)
    parts = [training(rows, batch_size=2, rank=rank, world_size=2) for rank in (0, 1)]
    for b in range(12):
        alone = whole[b]["tokens"].view(4, 10)
        shared = [part[b]["tokens"].view(2, 10) for part in parts]
        assert (alone[0::2] == shared[0]).all()
        assert (alone[1::2] == shared[1]).all()


@pytest.mark.parametrize("length", [31, 32, 33, 40])
def test_validation_asks_every_token_once(length):
    tokens = stream(length)
    rows = rows_of(tokens, context=8, partial=True)
    batches = ValidationBatches(rows, batch_size=3, cu_seqlens_length=cu_seqlens_length([rows], batch_size=3))
    asked = [t for b in range(len(batches)) for t in batches[b]["targets"].flatten().tolist() if t != IGNORE_INDEX]
    assert asked == tokens[1:].tolist()
    assert {batches[b]["tokens"].shape for b in range(len(batches))} == {(1, 24)}
    with pytest.raises(IndexError):
        batches[len(batches)]
