"""The public function: it checks its arguments, chooses a backend and runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike
from lkda.ops.residual_norm import cuda
from lkda.ops.residual_norm.reference import residual_norm_torch
from lkda.ops.runtime.backend import Backend, choose

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.residual_norm_cuda, cuda.cannot_run),
    "torch": Backend(residual_norm_torch),
}


def residual_norm(
    x: Tensor, y: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """s = x + y and n = s / sqrt(mean of s^2 + eps) * weight, over the last dimension.

    s is rounded to its data type, that of x + y in PyTorch. n is computed from the rounded s in float32 at least, and
    rounded once.

    Args:
        x: [..., d], the residual stream.
        y: of x's shape, what a layer adds to the stream; its data type may differ. None if nothing is added: s is x.
        weight: [d].
        eps: added to the mean.
        dtype: the data type of n.
        backend: auto | cuda | torch.
    Returns: s and n, of x's shape.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "residual_norm"
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise InputError(f"{fn}: weight must be [d] for x [..., d], got {list(weight.shape)} for x {list(x.shape)}.")
    if y is not None and y.shape != x.shape:
        raise InputError(f"{fn}: y must have x's shape {list(x.shape)}, got {list(y.shape)}.")
    check_alike(fn, {"x": x, "y": y, "weight": weight}, same_dtype=())
    if not dtype.is_floating_point:
        raise InputError(f"{fn}: dtype, that of the norm, must be a floating-point type, got {dtype}.")
    stream = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    widest = torch.promote_types(stream, dtype)
    word = choose(fn, BACKENDS, backend, device=x.device, head_dim=x.shape[-1], dtype=widest)
    s, n = BACKENDS[word].run(x.to(stream), y, weight, float(eps), dtype)
    return s, n
