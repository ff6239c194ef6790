"""What the tests of the layer's small ops share: gradients of several outputs, and what an error may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.ops.cases import poisoned, relative

SUMS = 1e-5  # sums in float32 need not be better than that


def outputs_and_gradients(op: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs out0, out1, ... and the gradient of each input, for fixed random gradients, exact in bfloat16."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with poisoned():
        outputs = op(**leaves)
        generator = torch.Generator().manual_seed(1)
        random = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), random)
    found = {f"out{i}": x for i, x in enumerate(outputs)}
    return found | {f"d{name}": x for name, x in zip(leaves, gradients)}


def assert_same_bits_traced(op: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor]) -> None:
    """torch.compile traces the op in one graph, whose outputs and gradients are those of the op itself."""
    want = outputs_and_gradients(op, inputs)
    got = outputs_and_gradients(torch.compile(op, backend="aot_eager", fullgraph=True), inputs)
    assert [name for name, x in want.items() if not torch.equal(got[name], x)] == []


def assert_error_within_reference(got: dict[str, Tensor], want: dict[str, Tensor], *, sums: float = SUMS) -> None:
    """An error may be at most twice that of the reference, or that of sums in float32. The operators have no matrix
    product, so the reference is the float64 result, rounded to the dtype in which it is stored."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        allowed = max(2 * relative(x.to(got[name].dtype), x), sums)
        error = relative(got[name], x)
        assert error <= allowed, f"{name} errs {error:.1e}, allowed {allowed:.1e}"
