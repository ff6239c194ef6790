"""What sends a call through the dispatcher."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_ordinary_tensors_bypass_the_dispatcher():
    assert can_bypass_dispatcher(torch.zeros(1), None, torch.nn.Parameter(torch.zeros(1)))


def test_whatever_watches_keeps_the_dispatcher():
    x = torch.zeros(1)
    with Watching():
        assert not can_bypass_dispatcher(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not can_bypass_dispatcher(fake)
    seen = []
    torch.func.grad(lambda y: (seen.append(can_bypass_dispatcher(y)), y.sum())[1])(x)
    torch.compile(lambda y: y + can_bypass_dispatcher(y), backend="eager", fullgraph=True)(x)
    assert seen == [False]
    assert float(torch.compile(lambda y: y + can_bypass_dispatcher(y), backend="eager", fullgraph=True)(x)) == 0


def test_without_dispatcher_has_the_gradient_of_the_op_and_of_no_other_result():
    def save(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])

    def gradients(ctx, grad, _):
        x, kept = ctx.saved_tensors
        return grad * kept + 0 * x, None

    call = without_dispatcher(lambda x, factor: (factor * x, torch.full_like(x, factor)), save, gradients, results=1)
    x = torch.ones(3, requires_grad=True)
    y, kept = call(x, 5.0)
    assert y.requires_grad
    assert not kept.requires_grad
    (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.full((3,), 5.0))


def test_whether_a_gradient_is_wanted():
    x, leaf = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert wants_gradient(x, None, leaf)
    assert not wants_gradient(x, None)
    with torch.no_grad():
        assert not wants_gradient(leaf)
