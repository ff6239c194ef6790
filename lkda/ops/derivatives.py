"""What becomes of a derivative that nobody has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def refusing_second_derivatives(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`gradients`, a backward whose results are not differentiable. Whoever differentiates them gets an error.

    PyTorch's `once_differentiable` gives the error only if an incoming gradient has a history. That of a loss has none,
    and the derivative would silently lack what this operator adds to it.
    """

    def once(ctx: Any, *incoming: Tensor | None) -> Any:
        with torch.no_grad():
            found = gradients(ctx, *incoming)
        if not torch.is_grad_enabled():
            return found
        histories = [x for x in (*ctx.saved_tensors, *incoming) if x is not None and x.requires_grad]
        return tuple(None if x is None else _WithoutDerivative.apply(x, *histories) for x in found)

    return once


class _WithoutDerivative(torch.autograd.Function):
    """x, with the history of other tensors; its derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *histories: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        raise RuntimeError("an operator of lkda has first derivatives only: leave create_graph=True out.")
