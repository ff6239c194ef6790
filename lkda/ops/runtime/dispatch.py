"""A call may go straight to its kernels, past PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PLAIN = (Tensor, torch.nn.Parameter)


def goes_straight(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd can be watching a call on these tensors.

    A custom op is what the tracer, fake tensors and dispatch modes see; in Python its passage through the dispatcher
    costs more host time than a short kernel runs. Where none of them is there, an op's function is called by itself.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a loop: `any` of a generator takes three times as long
        if x is not None and type(x) not in _PLAIN:
            return False
    return True


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def straight(
    forward: Callable[..., Any], save: Callable, gradients: Callable, *, results: int | None = None
) -> Callable[..., Any]:
    """`forward` with an op's autograd, but without the dispatcher.

    Args:
        forward: of the op; its results, tensors or None.
        save, gradients: `setup_context` and `backward` of `torch.library.register_autograd`.
        results: how many of the first results have a gradient; all where None.
    """

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            save(ctx, inputs, output)
            if results is not None:
                ctx.mark_non_differentiable(*(x for x in output[results:] if x is not None))
            return output

        backward = staticmethod(once_differentiable(gradients))  # type: ignore[assignment]

    return Straight.apply
