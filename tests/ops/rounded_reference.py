"""What KDA's kernels are tested against: the float64 recurrence, and the reference with rounded operands.

A kernel's error may be at most twice that of the reference, in the output, the state and every gradient. The reference
is the chunked form in PyTorch: the operands of every matrix product are rounded to bf16, sums, state and triangular
solve are in float32, and what is stored in bf16 is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lkda.ops import kda_attention
from lkda.ops.kda.reference import chunk


def outputs_and_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], **options: object
) -> dict[str, Tensor]:
    """o, final_state and the gradient of each input, for fixed random gradients of both outputs."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, state = op(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    do, dstate = (torch.randn(x.shape, generator=generator).to(o.device) for x in (o, state))
    gradients = torch.autograd.grad((o * do.to(o.dtype)).sum() + (state * dstate).sum(), list(leaves.values()))
    return {"o": o, "final_state": state} | {f"d{name}": x for name, x in zip(leaves, gradients)}


def kda_truth(inputs: dict[str, Tensor], *, backend: str = "recurrent", **options: object) -> dict[str, Tensor]:
    """The float64 recurrence on the very inputs that the kernel gets; or "chunk", which equals it to 1e-12."""
    return outputs_and_gradients(kda_attention, {k: x.double() for k, x in inputs.items()}, backend=backend, **options)


@contextmanager
def operands_rounded() -> Iterator[None]:
    """The chunked form's products take operands in bf16."""

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(a.bfloat16().float(), b.bfloat16().float())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "product", rounded)
        yield


def kda_rounded_reference(inputs: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """The chunked form with bf16 operands, of inputs in their own dtypes."""
    with operands_rounded():
        return outputs_and_gradients(kda_attention, inputs, backend="chunk", **options)
