"""Calls of C++ that are recorded and repeated, and what makes a recording unusable."""

from __future__ import annotations

import pytest
import torch

from lkda.ops.rows.cpu import add_rows, norm_rows
from lkda.ops.runtime import cpp
from lkda.ops.runtime.recording import recorded

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


WEIGHT = torch.tensor([1.0, 2.0])


@torch.inference_mode()
def test_new_numbers_in_the_same_tensors_give_new_numbers() -> None:
    x = torch.randn(16)
    with recorded() as recording:
        y = add_rows(x[:8].view(2, 4), x[8:].view(2, 4))
        z = norm_rows(y.view(4, 2), WEIGHT, 1e-5)
    assert recording.refused is None
    x.copy_(torch.randn(16))
    want = norm_rows((x[:8] + x[8:]).view(4, 2), WEIGHT, 1e-5)
    assert not torch.equal(z, want)
    recording.repeat()
    assert torch.equal(z, want)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda x: x * 2, "aten.mul"),
        (lambda x: x.t().contiguous(), "aten.contiguous"),
        (lambda x: x.t().reshape(-1), "aten.reshape"),
        (lambda x: x.add_(1), "aten.add_"),
        (lambda x: float(x.sum()), "aten.sum"),
        (lambda x: torch.zeros(3), "aten.zeros"),
        (lambda x: x.double(), "aten.to"),
    ],
)
def test_other_operations_are_refused_by_name(compute, name: str) -> None:
    x = torch.randn(2, 4)
    with recorded() as recording:
        add_rows(x, x)
        compute(x)
    assert str(recording.refused).startswith(name)


@torch.inference_mode()
def test_calls_after_the_recording_are_not_part_of_it() -> None:
    x, y = torch.zeros(4), torch.ones(4)
    with recorded() as recording:
        total = add_rows(x, y)
    later = add_rows(total, y)
    recording.repeat()
    assert later.tolist() == [2.0] * 4
    assert len(recording._calls) == 1
