"""How many segments a sequence is cut into."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lkda.ops.kda.cuda import core
from lkda.ops.kda.cuda.segments import MIN_CHUNKS, MIN_SEGMENTS, optional_segment_count, segment_count


@pytest.mark.parametrize(
    ("sequences", "heads", "chunks", "want"),
    [
        (1, 4, 1024, 33),  # fills the multiprocessors
        (1, 8, 128, 16),
        (1, 16, 128, 8),
        (1, 16, 24, 6),  # of no fewer than four chunks
        (8, 16, 32, 1),  # enough heads without
        (1, 34, 1024, 1),  # three segments are not worth a second pass
        (1, 1, 1, 1),
        (1000, 64, 1, 1),
    ],
)
def test_segments_fill_the_chip_and_no_more(sequences, heads, chunks, want):
    found = segment_count(sequences, heads, chunks)
    assert found == want
    if want > 1:
        assert found >= MIN_SEGMENTS
        assert chunks >= found * MIN_CHUNKS


@pytest.mark.parametrize(
    ("sequences", "heads", "chunks", "D", "want"),
    [
        (4, 12, 64, 64, 2),  # 48 heads, too many for four segments
        (8, 8, 32, 64, 2),
        (3, 12, 64, 32, 3),
        (8, 16, 32, 64, 1),  # enough heads without
        (4, 12, 64, 128, 1),  # two blocks per head
        (4, 12, 15, 64, 1),  # of no fewer than eight chunks
        (1000, 64, 1, 64, 1),
    ],
)
def test_optional_segments_where_others_are_not_worth_it(sequences, heads, chunks, D, want):
    assert segment_count(sequences, heads, chunks) == 1
    assert optional_segment_count(sequences, heads, chunks, D) == want


@pytest.mark.parametrize("usual", [torch.bfloat16, torch.float64], ids=str)
def test_memory_between_the_passes_is_float32_whatever_the_default_dtype_is(usual):
    plan = SimpleNamespace(optional=False, state_numbers=10, sequences=1, segments=2, device="cpu", amax=None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(usual)
    try:
        memory = core._scratch(plan, 3)[0]
    finally:
        torch.set_default_dtype(before)
    assert memory.dtype == torch.float32
    assert len(memory) == 3 * 10 + 2 * 3
