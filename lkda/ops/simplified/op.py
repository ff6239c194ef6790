"""The public functions of simplified linear attention: they check their arguments, choose a backend and run it."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_cu_seqlens, check_shape
from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.runtime.dispatch import wants_gradient
from lkda.ops.simplified.cuda import core as cuda
from lkda.ops.simplified.reference.chunk import simplified_chunk
from lkda.ops.simplified.reference.recurrent import simplified_recurrent, simplified_step_recurrent

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.simplified_cuda, cuda.reason_cannot_run),
    "cuda_baseline": Backend(cuda.simplified_cuda_baseline, cuda.reason_cannot_run, automatic=False),
    "chunk": Backend(simplified_chunk),
    "recurrent": Backend(simplified_recurrent),
}


def simplified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal simplified linear attention: a decayed average of v, weighted by sigmoid(k), gated by q. Per channel:

        num_t = b_t num_{t-1} + sigmoid(k_t) v_t        den_t = b_t den_{t-1} + sigmoid(k_t)
        o_t = q_t num_t / (den_t + 1e-30)

    Args:
        q, k, v: [B, T, H, D], of one dtype.
        decay: b, [B, T, H] or, constant over tokens, [H]; in (0, 1].
        initial_state: [B, H, 2, D] (num, den), or [N, H, 2, D] with cu_seqlens; None for zeros.
        cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1); they may be empty.
        backend: auto | cuda | cuda_baseline | chunk | recurrent.
    Returns: o [B, T, H, D] in v's dtype, final_state [B or N, H, 2, D] in float32 (float64 for float64 inputs).
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "simplified_attention"
    sizes: dict[str, int] = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(fn, name, x, "B T H D", sizes)
    check_shape(fn, "decay", decay, "H" if decay.dim() == 1 else "B T H", sizes)
    if sizes["T"] == 0:
        raise InputError(f"{fn}: T must be at least 1, got q of {list(q.shape)}.")
    if cu_seqlens is not None:
        check_cu_seqlens(fn, cu_seqlens, sizes["B"], sizes["T"])
        sizes["N"] = len(cu_seqlens) - 1
    sizes["2"] = 2
    if initial_state is not None:
        check_shape(fn, "initial_state", initial_state, "B H 2 D" if cu_seqlens is None else "N H 2 D", sizes)
    tensors = {"q": q, "k": k, "v": v, "decay": decay, "initial_state": initial_state}
    check_alike(fn, tensors, same_dtype=("q", "k", "v"))
    word = choose(fn, BACKENDS, backend, device=q.device, head_dim=sizes["D"], dtype=q.dtype)
    return BACKENDS[word].run(q, k, v, decay.expand(q.shape[:3]), initial_state, cu_seqlens)


def simplified_step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `simplified_attention`, for decoding.

    Args:
        q, k, v: [B, H, D].   decay: [B, H] or [H].   state: [B, H, 2, D] (num, den), float32 or float64.
    Returns: o [B, H, D] in v's dtype, and the state after the token, in the given state's dtype.
    Raises: ValueError if a shape, dtype or device does not fit.
    """
    fn = "simplified_step"
    sizes: dict[str, int] = {"2": 2}
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(fn, name, x, "B H D", sizes)
    check_shape(fn, "decay", decay, "H" if decay.dim() == 1 else "B H", sizes)
    check_shape(fn, "state", state, "B H 2 D", sizes)
    check_alike(fn, {"q": q, "k": k, "v": v, "decay": decay, "state": state}, same_dtype=("q", "k", "v"))
    tensors = (q, k, v, decay, state)
    differentiable = wants_gradient(*tensors)
    on_gpu = state.dtype == torch.float32 and cuda.reason_cannot_run(q.device, sizes["D"], q.dtype) is None
    if on_gpu and not differentiable:
        return cuda.simplified_step_cuda(*tensors)
    dtype = torch.promote_types(compute_dtype(v), state.dtype)
    q_, k_, v_, decay_, state_ = (x.to(dtype) for x in (q, k, v, decay.expand(q.shape[:2]), state))
    o, state_after = simplified_step_recurrent(q_, k_, v_, decay_, state_)
    return o.to(v.dtype), state_after.to(state.dtype)
