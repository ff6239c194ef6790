"""The gated norm in C++ on a CPU against the form in PyTorch."""

from __future__ import annotations

import pytest
import torch

from lkda.ops import gated_rms_norm
from lkda.ops.runtime import cpp
from tests.ops.cases import relative
from tests.ops.layer_cases import outputs_and_gradients

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("rows", "D"), [(1, 1), (7, 20), (200, 64)])
def test_equals_the_form_in_pytorch(rows, D, gated, dtype, allowed):
    draw = torch.Generator().manual_seed(0)
    shapes = {"x": (2, rows, D), "weight": (D,)} | ({"gate": (2, rows, D)} if gated else {})
    inputs = {name: 3 * torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}

    def run(backend):
        def op(x, weight, gate=None):
            return (gated_rms_norm(x, gate, weight, backend=backend),)

        return outputs_and_gradients(op, inputs)

    want = run("torch")
    for name, got in run("cpu").items():
        assert got.dtype == dtype
        assert relative(got, want[name]) < allowed or (got - want[name]).abs().max() < allowed, name


def test_strided_inputs():
    x, gate = torch.randn(2, 64, 10).mT, torch.randn(2, 64, 10).mT
    got, want = (gated_rms_norm(x, gate, torch.ones(64), backend=word) for word in ("cpu", "torch"))
    torch.testing.assert_close(got, want)


def test_the_custom_op_is_what_pytorch_expects():
    x, gate, weight = (torch.randn(shape, requires_grad=True) for shape in ((3, 8), (3, 8), (8,)))
    torch.library.opcheck(torch.ops.lkda.gated_norm_cpu_forward.default, (x, gate, weight, 1e-5))
