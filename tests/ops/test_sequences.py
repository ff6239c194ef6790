"""What is known of packed sequences."""

import torch

from lkda.ops import sequences
from lkda.ops.sequences import longest


def test_longest_sequence_is_read_once_for_bounds_that_do_not_change(monkeypatch):
    bounds, reads = torch.tensor([0, 0, 3, 10, 10]), []
    read = torch.Tensor.diff
    monkeypatch.setattr(torch.Tensor, "diff", lambda x: reads.append(x) or read(x))
    assert longest(bounds, 10) == 7
    assert longest(bounds, 10) == 7
    assert len(reads) == 1
    bounds[2] = 9
    assert longest(bounds, 10) == 9
    assert longest(torch.tensor([0, 4, 10]), 10) == 6


def test_nothing_is_read_of_bounds_that_are_traced():
    found = torch.compile(lambda bounds: longest(bounds, 10), backend="eager", fullgraph=True)(torch.tensor([0, 4, 10]))
    assert found == 10


def test_bounds_that_are_gone_are_forgotten():
    before = len(sequences._longest)
    longest(torch.tensor([0, 1]), 1)
    assert len(sequences._longest) == before
