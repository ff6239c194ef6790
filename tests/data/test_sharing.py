"""Rows shared out among processes and workers: a pure function of rank, number of processes and step, without overlap
or gap, also where a run is resumed in the middle of an epoch with another number of processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from lkda.data.datamodule import CountUp
from lkda.data.packing import JoinedRows, Rows, TrainingBatches, cu_seqlens_length
from lkda.data.shuffle import CYCLE, shares, weighted

CONTEXT, GLOBAL = 8, 12  # tokens per row, rows per step


def joined(*counts: int) -> JoinedRows:
    """Sources with these numbers of rows. Every token is unique, and the first of row n of all sources is 8 n."""
    parts, first = [], 0
    for count in counts:
        tokens = np.arange(first, first + count * CONTEXT + 1)
        parts.append(Rows(tokens, starts=np.zeros(1, dtype=np.int64), context=CONTEXT, partial=False))
        first += count * CONTEXT
    return JoinedRows(parts)


def rows_of_step(
    rows: JoinedRows, step: int, *, world_size: int, pieces: int = 1, parts: Sequence[tuple[int, float]] | None = None
) -> list[int]:
    """The numbers of the rows on which all processes train in a step of GLOBAL rows, in `pieces` batches each."""
    batch_size = GLOBAL // world_size // pieces
    length = cu_seqlens_length([rows], batch_size=batch_size)
    found: list[int] = []
    for rank in range(world_size):
        batches = TrainingBatches(
            rows,
            batch_size=batch_size,
            cu_seqlens_length=length,
            seed=5,
            rank=rank,
            world_size=world_size,
            parts=parts,
        )
        for piece in range(pieces):
            tokens = batches[step * pieces + piece]["tokens"].view(batch_size, CONTEXT)
            found += (tokens[:, 0] // CONTEXT).tolist()
    return sorted(found)


@pytest.mark.parametrize("parts", [None, [(30, 0.7), (18, 0.3)]])
@pytest.mark.parametrize(("world_size", "pieces"), [(2, 1), (3, 2), (6, 1), (12, 1), (1, 4), (4, 3)])
def test_a_step_has_the_same_rows_for_every_number_of_processes_and_pieces(world_size, pieces, parts):
    rows = joined(30, 18)
    for step in (0, 1, 3, 4, 17):
        shared = rows_of_step(rows, step, world_size=world_size, pieces=pieces, parts=parts)
        assert shared == rows_of_step(rows, step, world_size=1, parts=parts)


@pytest.mark.parametrize("counts", [(48,), (30, 18), (1, 46, 1)])
def test_an_epoch_that_changes_its_number_of_processes_has_every_row_once(counts):
    """2 -> 1 -> 2 processes, and 3 and 6, each time in the middle of an epoch of four steps."""
    rows = joined(*counts)
    sizes = [2, 1, 2, 6, 3, 1, 12, 4]
    seen = [row for step, size in enumerate(sizes) for row in rows_of_step(rows, step, world_size=size)]
    assert Counter(seen[:48]) == Counter(seen[48:]) == dict.fromkeys(range(48), 1)


def test_a_resumed_epoch_whose_rows_do_not_divide_into_steps_has_no_gap():
    rows = joined(31)
    seen = [row for step in range(31) for row in rows_of_step(rows, step, world_size=2 if step % 3 else 1)]
    assert Counter(seen) == dict.fromkeys(range(31), GLOBAL)  # 31 steps of 12 rows are 12 epochs of 31 rows


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_have_every_batch_once(workers, monkeypatch):
    class Worker:
        num_workers = workers

        def __init__(self, number: int) -> None:
            self.id = number

    streams = []
    for number in range(workers):
        with monkeypatch.context() as patch:
            patch.setattr("lkda.data.datamodule.get_worker_info", lambda number=number: Worker(number))
            stream = iter(CountUp(range(1000), start=7))  # type: ignore[arg-type]
            streams.append([next(stream) for _ in range(10)])
    in_turn = [batch for turn in zip(*streams) for batch in turn]
    assert in_turn == list(range(7, 7 + 10 * workers))


def test_sources_have_their_weights_and_their_own_epochs():
    sizes, weights = (100, 7, 2000), (0.5, 0.2, 0.3)
    rows = weighted(np.arange(2 * CYCLE), list(zip(sizes, weights)), seed=1)
    firsts = np.cumsum([0, *sizes])
    source = np.searchsorted(firsts, rows, side="right") - 1
    for begin in (0, CYCLE):
        assert np.bincount(source[begin : begin + CYCLE]).tolist() == [5000, 2000, 3000]
    for number, size in enumerate(sizes):
        own = rows[source == number] - firsts[number]
        for begin in range(0, len(own) // size * size, size):
            assert len(np.unique(own[begin : begin + size])) == size
    early = np.bincount(source[:500], minlength=3) / 500
    assert np.abs(early - weights).max() < 0.08  # mixed from the beginning, not source by source


def test_a_weighted_row_depends_on_the_place_alone():
    parts = [(100, 1.0), (50, 3.0)]
    places = np.array([3 * CYCLE + 17, 5, 12_345, 5])
    alone = [int(weighted(np.array([place]), parts, seed=2)[0]) for place in places]
    assert weighted(places, parts, seed=2).tolist() == alone
    # Written down, because a resumed run may have another version of numpy.
    assert alone == [147, 128, 132, 128]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], r"weights must be positive, got \[1.0, 0.0\]: leave a source out"),
        ([1.0, float("nan")], "weights must be positive"),
        ([1.0, 1e-9], "differ too much: each must be at least 1/10000 of their sum"),
    ],
)
def test_weights_that_cannot_be_met_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        shares(weights)


def test_shares_are_whole_and_complete():
    assert shares([1, 1, 1]).tolist() == [3334, 3333, 3333]
    assert shares([2.0]).tolist() == [CYCLE]
    assert shares([1.5e308, 1.5e308]).tolist() == [CYCLE // 2] * 2  # whose sum is infinite
    assert shares([5e-324, 5e-324]).tolist() == [CYCLE // 2] * 2
