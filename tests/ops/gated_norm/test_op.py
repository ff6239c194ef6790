"""The gated norm: its form in PyTorch, and its kernels run on the CPU, against float64."""

import shutil

import pytest
import torch

from lkda.ops import gated_rms_norm
from lkda.ops.gated_norm import cuda
from lkda.ops.gated_norm.op import BACKENDS
from tests.ops.emulation import kernels_on_the_cpu  # noqa: F401
from tests.ops.layer_cases import assert_error_within_reference, outputs_and_gradients

emulated = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("kernels_on_the_cpu"),
]


def inputs_of(*shape, dtype=torch.bfloat16, gated=True):
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    return {"x": x, "gate": gate, "weight": weight} if gated else {"x": x, "weight": weight}


def norm(backend):
    def run(x, weight, gate=None):
        return (BACKENDS[backend].run(x, gate, weight, 1e-5),)

    return run


def check(inputs):
    want = outputs_and_gradients(norm("torch"), {name: x.double() for name, x in inputs.items()})
    assert_error_within_reference(outputs_and_gradients(norm("cuda"), inputs), want)


def test_is_the_norm_times_weight_and_gate():
    inputs = {name: x.double() for name, x in inputs_of(3, 5, 7).items()}
    x, gate, weight = inputs.values()
    want = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(gated_rms_norm(x, None, weight), want)
    torch.testing.assert_close(gated_rms_norm(x, gate, weight), want / (1 + torch.exp(-gate)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(5)}, r"weight must be \[D\] for x .*, got \[5\]"),
        ({"gate": torch.ones(2, 6)}, r"gate must have x's shape \[2, 3, 6\], got \[2, 6\]"),
        ({"gate": torch.ones(2, 3, 6, dtype=torch.float64)}, "x is torch.float32|gate is torch.float64"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    given = {"x": torch.ones(2, 3, 6), "gate": torch.ones(2, 3, 6), "weight": torch.ones(6)} | changes
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**given)
    with pytest.raises(ValueError, match="not on a CUDA device"):
        gated_rms_norm(torch.ones(2, 64), None, torch.ones(64), backend="cuda")


class TestKernels:
    pytestmark = emulated

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize(
        ("dtype", "D"), [(torch.bfloat16, 32), (torch.float16, 64), (torch.float32, 128), (torch.bfloat16, 128)]
    )
    def test_forward_and_backward(self, dtype, D, gated):
        check(inputs_of(2, 37, 3, D, dtype=dtype, gated=gated))

    def test_of_one_row(self):
        check(inputs_of(1, 64))

    def test_of_more_groups_of_rows_than_blocks(self, monkeypatch):
        monkeypatch.setattr(cuda, "MAX_BLOCKS", 2)
        check(inputs_of(2, 150, 3, 64))

    def test_strided_inputs_and_gradients(self):
        inputs = inputs_of(2, 9, 3, 64)
        want = outputs_and_gradients(norm("cuda"), inputs)
        strided = inputs | {"x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)}
        got = outputs_and_gradients(norm("cuda"), strided)
        assert all(torch.equal(got[name], x) for name, x in want.items())
        leaves = [x.detach().requires_grad_() for x in strided.values()]
        norm("cuda")(leaves[0], leaves[2], leaves[1])[0].sum().backward()
        assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_eps_may_be_a_whole_number(backend):
    """A C++ function would read an int from another register than a float."""
    x, weight = torch.randn(3, 32), torch.ones(32)
    got, want = (gated_rms_norm(x, x, weight, eps=eps, backend=backend) for eps in (1, 1.0))
    assert torch.equal(got, want)
