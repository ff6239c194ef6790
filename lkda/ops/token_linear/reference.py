"""What the kernel computes, in PyTorch: for many tokens, other devices and dtypes, and to compare the kernel with."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lkda.ops.gated_norm.op import gated_rms_norm
from lkda.ops.swiglu.op import swiglu as swiglu_halves


def normed_linear_torch(x: Tensor, norm: Tensor, weight: Tensor, eps: float, swiglu: bool) -> Tensor:
    y = F.linear(F.rms_norm(x, norm.shape, norm.to(x.dtype), eps), weight)
    return swiglu_halves(y) if swiglu else y


def grouped_linear_torch(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return x.unflatten(-1, (len(weight), -1)).transpose(0, 1).bmm(weight.transpose(1, 2)).unbind()


def add_linear_torch(x: Tensor, y: Tensor, weight: Tensor) -> None:
    x.addmm_(y, weight.t())


def add_gated_linear_torch(x: Tensor, o: Tensor, gate: Tensor | None, norm: Tensor, weight: Tensor, eps: float) -> None:
    gates = None if gate is None else gate.unflatten(-1, o.shape[-2:])
    x.addmm_(gated_rms_norm(o, gates, norm, eps=eps).flatten(1), weight.t())
