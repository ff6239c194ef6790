"""What sends a call through the dispatcher."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lkda.ops.dispatch import goes_straight


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_plain_tensors_go_straight():
    assert goes_straight(torch.zeros(1), None, torch.nn.Parameter(torch.zeros(1)))


def test_whatever_watches_keeps_the_dispatcher():
    x = torch.zeros(1)
    with Watching():
        assert not goes_straight(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert not goes_straight(fake)
    seen = []
    torch.func.grad(lambda y: (seen.append(goes_straight(y)), y.sum())[1])(x)
    torch.compile(lambda y: y + goes_straight(y), backend="eager", fullgraph=True)(x)
    assert seen == [False]
    assert float(torch.compile(lambda y: y + goes_straight(y), backend="eager", fullgraph=True)(x)) == 0
