"""The public function: it checks its argument, chooses a backend and runs it."""

from __future__ import annotations

from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.runtime.dispatch import wants_gradient
from lkda.ops.swiglu import cuda
from lkda.ops.swiglu.reference import swiglu_torch

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.swiglu_cuda, cuda.cannot_run),
    "torch": Backend(swiglu_torch),
}


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """SiLU(gate) * up of the two halves of a product: x [B, 2 * hidden] = [gate, up] -> [B, hidden].

    In half precision PyTorch rounds SiLU(gate) and the product, the kernel the product alone. The kernel has no
    backward, and `auto` does not choose it where a gradient is wanted.

    Args:
        backend: auto | cuda | torch.
    Raises: ValueError if the shape or dtype does not fit, or if the kernel is asked for a gradient.
    """
    if x.dim() != 2 or x.shape[1] % 2 or not x.dtype.is_floating_point:
        raise InputError(f"swiglu: x must be [B, 2 * hidden] in floating point, got {list(x.shape)} of {x.dtype}.")
    differentiable = wants_gradient(x)
    if backend == "auto" and differentiable:
        backend = "torch"
    word = choose("swiglu", BACKENDS, backend, device=x.device, head_dim=x.shape[1] // 2, dtype=x.dtype)
    if word == "cuda" and differentiable:
        raise InputError("swiglu(backend='cuda') has no backward and x requires a gradient; use backend='torch'.")
    y: Tensor = BACKENDS[word].run(x)
    return y
