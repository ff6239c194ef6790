"""The short convolutions in C++ on a CPU against the form in PyTorch: outputs, states and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lkda.ops import short_convolutions
from lkda.ops.runtime import cpp
from lkda.ops.short_conv import cpu
from tests.ops.cases import relative
from tests.ops.layer_cases import outputs_and_gradients

PACKED = [0, 0, 1, 3, 3, 20, 41, 41]
NORMS = [((True, False, True), 8), ((False, False, False), None), ((True, True, True), 24)]

pytestmark = pytest.mark.skipif(cpp.compiler() is None, reason="no C++ compiler")


def inputs_of(packed: bool, width: int, dtype: torch.dtype, states: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    batch, sequences = (1, len(PACKED) - 1) if packed else (2, 2)
    shapes = {"x": (batch, 41, 24), "w": (24, 1, width)} | ({"s": (sequences, width - 1, 24)} if states else {})
    return {f"{n}{i}": torch.randn(s, generator=draw, dtype=dtype) for n, s in shapes.items() for i in range(3)}


def run(inputs: dict[str, Tensor], backend: str, packed: bool, norm: tuple) -> dict[str, Tensor]:
    def op(**given: Tensor) -> list[Tensor]:
        xs, ws, ss = ([x for name, x in given.items() if name[0] == letter] for letter in "xws")
        options = {"normalized": norm[0], "head_dim": norm[1], "cu_seqlens": torch.tensor(PACKED) if packed else None}
        ys, lasts = short_convolutions(xs, ws, states=ss or None, backend=backend, **options)
        return [*ys, *lasts]

    return outputs_and_gradients(op, inputs)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("width", "dtype", "allowed"),
    [(1, torch.float64, 1e-12), (4, torch.float64, 1e-12), (6, torch.float64, 1e-12), (4, torch.float32, 2e-6)],
)
def test_equals_the_form_in_pytorch(width, dtype, allowed, packed, states, norm):
    inputs = inputs_of(packed, width, dtype, states and width > 1)
    want = run(inputs, "torch", packed, norm)
    for name, got in run(inputs, "cpu", packed, norm).items():
        assert got.shape == want[name].shape
        assert got.numel() == 0 or relative(got, want[name]) < allowed, name


def test_large_inputs_saturate():
    x = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30]).repeat(2).view(1, 2, 7).requires_grad_()
    weight = torch.zeros(7, 1, 2)
    weight[..., -1] = 1
    results = [short_convolutions((x,), (weight,), backend=word)[0][0] for word in ("cpu", "torch")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in results))


def test_one_token_of_each_row_may_have_any_stride_over_time():
    """The stride of an axis of length 1 means nothing: PyTorch calls such a tensor contiguous."""
    x, weight, state = torch.randn(3, 8, 1).mT.requires_grad_(), torch.randn(8, 1, 4), torch.randn(3, 3, 8)
    assert x.stride() == (8, 1, 1)
    assert x.is_contiguous()
    results = []
    for word in ("cpu", "torch"):
        (y,), (last,) = short_convolutions((x,), (weight,), states=(state,), backend=word)
        results.append((y, last, *torch.autograd.grad(y.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_streams_may_lie_side_by_side_in_one_tensor():
    inputs = inputs_of(False, 4, torch.float32, False)
    side_by_side = torch.cat([inputs[f"x{i}"] for i in range(3)], -1)
    views = inputs | {f"x{i}": x for i, x in enumerate(side_by_side.chunk(3, -1))}
    assert not views["x1"].is_contiguous()
    want = run(inputs, "cpu", False, NORMS[0])
    assert {
        name: torch.equal(x, want[name]) for name, x in run(views, "cpu", False, NORMS[0]).items()
    } == dict.fromkeys(want, True)
    weights = [inputs[f"w{i}"] for i in range(3)]
    joined, separate = side_by_side.requires_grad_(), [inputs[f"x{i}"].requires_grad_() for i in range(3)]
    outputs = [
        cpu.short_convolutions_cpu(xs, weights, (True, False, True), 8, None, None)[0] for xs in (joined, separate)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    (got,) = torch.autograd.grad(sum(y.square().sum() for y in outputs[0]), joined)
    wanted = torch.autograd.grad(sum(y.square().sum() for y in outputs[1]), separate)
    assert torch.equal(got, torch.cat(wanted, -1))


def test_gradients_are_laid_out_as_the_fake_implementation_says():
    inputs = list(inputs_of(False, 4, torch.float32, True).values())
    outputs = torch.ops.lkda.short_conv_cpu_forward(*inputs, None, 5, 8)
    backward = torch.ops.lkda.short_conv_cpu_backward
    real = backward(*outputs, *inputs, None, 5, 8)
    with FakeTensorMode() as mode:
        fake = backward(*(mode.from_tensor(x) for x in (*outputs, *inputs)), None, 5, 8)
    assert [(x.shape, x.stride()) for x in real] == [(x.shape, x.stride()) for x in fake]


def test_the_custom_op_is_what_pytorch_expects():
    inputs = [x.requires_grad_() for x in inputs_of(False, 4, torch.float32, True).values()]
    torch.library.opcheck(torch.ops.lkda.short_conv_cpu_forward.default, (*inputs, None, 5, 8))
