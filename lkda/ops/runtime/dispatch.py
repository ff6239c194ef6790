"""Calling an op's function directly, without PyTorch's dispatcher, where nothing but autograd watches the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


def can_bypass_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may skip PyTorch's dispatcher.

    The tracer, fake tensors and dispatch modes see a custom op only if it passes through the dispatcher. For an op
    written in Python that passage takes more host time than a short kernel takes to run. So an op's function is called
    directly where none of the three is active and every tensor is an ordinary one.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for x in tensors:  # noqa: SIM110 - `any` over a generator takes three times as long as this loop
        if x is not None and type(x) not in _TENSOR_TYPES:
            return False
    return True


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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


def without_dispatcher(
    forward: Callable[..., Any], save: Callable, gradients: Callable, *, results: int | None = None
) -> Callable[..., Any]:
    """A differentiable function that calls `forward` without the dispatcher.

    Args:
        forward: the op's implementation. It returns tensors, or None for a tensor that does not exist.
        save, gradients: `setup_context` and `backward`, as `torch.library.register_autograd` takes them.
        results: the first `results` outputs have a gradient, the others do not. None: all have one.
    """

    class WithoutDispatcher(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            if results is not None:
                ctx.mark_non_differentiable(*(x for x in output[results:] if x is not None))
            return output

        backward = staticmethod(refusing_second_derivatives(gradients))

    return WithoutDispatcher.apply
