"""Linear layers in oneDNN are those of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lkda.ops import linear
from lkda.ops.products import op
from tests.ops.cases import relative


@pytest.fixture(params=[True, False])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(op, "_onednn_is_faster", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(2, 40, 64), (3, 64), (0, 64)])
@pytest.mark.parametrize("outputs", [2, 96])
def test_linear_has_pytorchs_result_and_gradients(shape, outputs, onednn):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).requires_grad_()
    weight = torch.randn(outputs, 64, generator=draw).requires_grad_()
    got, want = linear(x, weight), F.linear(x, weight)
    assert got.shape == want.shape
    assert type(got.grad_fn).__name__.startswith("_Linear") == (onednn and shape == (2, 40, 64) and outputs == 96)
    dy = torch.randn(want.shape, generator=draw)
    pairs = zip((got, *torch.autograd.grad(got, (x, weight), dy)), (want, *torch.autograd.grad(want, (x, weight), dy)))
    assert all(relative(mine, theirs) < 1e-6 for mine, theirs in pairs)


def test_strided_inputs_and_one_gradient_alone(onednn):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 50, generator=draw).t(), torch.randn(64, 40, generator=draw).t()
    torch.testing.assert_close(op.product(x, weight.t()), x @ weight.t())
    for leaf in (x, weight):
        leaf.requires_grad_()
        (got,) = torch.autograd.grad(linear(x, weight).sum(), leaf)
        (want,) = torch.autograd.grad(F.linear(x, weight).sum(), leaf)
        torch.testing.assert_close(got, want)
        leaf.requires_grad_(False)


def test_autocast_still_rounds(onednn):
    x, weight = torch.randn(40, 64), torch.randn(50, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.double(), weight.double()).dtype == torch.float64


def test_a_part_of_a_larger_matrix_is_copied():
    """oneDNN falls back to a loop for it."""
    joined = torch.randn(64, 136)
    part = joined[:, :64]
    assert op._dense(part).is_contiguous()
    assert all(op._dense(x) is x for x in (joined, joined.t()))
    torch.testing.assert_close(op.product(joined.t(), part), joined.t() @ part)
