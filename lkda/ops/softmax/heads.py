"""The heads of q and k as attention multiplies them: an optional RMSNorm of each head, and its rotation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.softmax.cuda import rotary as cuda
from lkda.ops.softmax.rotary import rotate


def _torch(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    base: float | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = (x if w is None else _normed(x, w, eps) for x, w in ((q, q_weight), (k, k_weight)))
    return rotate(q, position, base), rotate(k, position, base)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.rotary_heads_cuda, cuda.reason_cannot_run),
    "torch": Backend(_torch),
}


def rotary_heads(
    q: Tensor,
    k: Tensor,
    position: Tensor,
    *,
    base: float | None,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k with the pairs (x_i, x_{i + D/2}) of each head turned by the angles position * base^(-2i/D).

    With weights, each head is normalised before: x / sqrt(mean of x^2 + eps) * weight. In half precision PyTorch rounds
    the norm and its rotation, the kernel the rotation alone.

    Args:
        q, k: [B, T, H, D], D even. They may have different numbers H of heads.
        position: [T], or [B, T].
        base: None for no rotation.
        weights: [D] for q and [D] for k, which all heads share. None for no norm.
        eps: added to the mean.
        backend: auto | cuda | torch.
    Returns: q and k, of the shapes and data types given.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "rotary_heads"
    if q.dim() != 4 or q.shape[-1] % 2 or k.dim() != 4 or k.shape[:2] + k.shape[3:] != q.shape[:2] + q.shape[3:]:
        raise InputError(f"{fn}: q and k must be [B, T, H, D], D even, got {list(q.shape)} and {list(k.shape)}.")
    B, T, _, D = q.shape
    if position.shape != (T,) and position.shape != (B, T):
        raise InputError(f"{fn}: position must be [T] or [B, T] for q {list(q.shape)}, got {list(position.shape)}.")
    if position.device != q.device:
        raise InputError(f"{fn}: position is on {position.device} and q on {q.device}; move one of them.")
    if weights is not None and [None if w is None else tuple(w.shape) for w in weights] != [(D,), (D,)]:
        got = " and ".join("None" if w is None else str(list(w.shape)) for w in weights)
        raise InputError(f"{fn}: weights must be two of [{D}], for q and for k, got {got}.")
    q_weight, k_weight = (None, None) if weights is None else weights
    tensors = {"q": q, "k": k, "weights[0]": q_weight, "weights[1]": k_weight}
    check_alike(fn, tensors, same_dtype=("q", "k"))
    word = choose(fn, BACKENDS, backend, device=q.device, head_dim=D, dtype=q.dtype)
    turned: tuple[Tensor, Tensor] = BACKENDS[word].run(q, k, position, base, q_weight, k_weight, float(eps))
    return turned
