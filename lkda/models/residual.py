"""The sum of the residual stream with a layer's output, and the norm of the sum, as the input of the next layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.models.rows import is_rms_norm
from lkda.ops import residual_norm


def normed_residual(x: Tensor, y: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """s = x + y and norm(s); s is x if y is None.

    On a GPU both are one launch. Under autocast the norm is then rounded to the data type of the linear layers, which
    read it. Modules that have been replaced by others, or have hooks, are called.

    Args:
        x: [..., d_model], the residual stream.
        y: of x's shape, what a layer adds to the stream.
        norm: an RMSNorm may have no weight.
    """
    if x.is_cuda and is_rms_norm(norm) and are_ordinary(x, y, norm.weight):
        assert norm.eps is not None
        weight = x.new_ones(x.shape[-1], dtype=torch.float32) if norm.weight is None else norm.weight
        return residual_norm(x, y, weight, eps=norm.eps, dtype=_multiplied_dtype(x))
    s = x if y is None else x + y
    return s, norm(s)


def are_ordinary(*tensors: Tensor | None) -> bool:
    """Whether none is of a class of its own, such as a tensor that several devices share."""
    return all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _multiplied_dtype(x: Tensor) -> torch.dtype:
    """The data type in which a linear layer multiplies x on a GPU."""
    autocast = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cuda") if autocast else x.dtype
