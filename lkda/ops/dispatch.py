"""Whether a call may go straight to its kernels, past PyTorch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

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
