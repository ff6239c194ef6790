"""Calling an op's function directly, without PyTorch's dispatcher, where nothing but autograd watches the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lkda.ops.derivatives import refusing_second_derivatives

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
