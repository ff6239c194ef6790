"""The decays of simplified linear attention from their logits."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike
from lkda.ops.precision import at_least_float32
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.simplified.cuda import decay as cuda


def _torch(logits: Tensor, bias: Tensor) -> Tensor:
    return torch.sigmoid(at_least_float32(logits) + at_least_float32(bias))


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.simplified_decay_cuda, cuda.cannot_run),
    "torch": Backend(_torch),
}


def simplified_decay(logits: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """sigmoid(logits + bias), in float32 at least.

    Args:
        logits: [..., H], with at least two dimensions.
        bias: [H].
        backend: auto | cuda | torch.
    Returns: [..., H].
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "simplified_decay"
    if bias.dim() != 1 or logits.dim() < 2 or logits.shape[-1] != bias.shape[0]:
        raise InputError(
            f"{fn}: logits must be [..., H] of at least two dimensions and bias [H], got {list(logits.shape)} and "
            f"{list(bias.shape)}."
        )
    check_alike(fn, {"logits": logits, "bias": bias}, same_dtype=())
    word = choose(fn, BACKENDS, backend, device=logits.device, head_dim=len(bias), dtype=logits.dtype)
    decay: Tensor = BACKENDS[word].run(logits, bias)
    return decay
