"""The public KDA functions: they check their arguments, choose a backend and run it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import alike, check_alike, check_cu_seqlens, check_shape
from lkda.ops.kda.cpu import core as cpu
from lkda.ops.kda.cuda import core as cuda
from lkda.ops.kda.cuda import recurrent as cuda_recurrent
from lkda.ops.kda.heads import in_square_heads, repeat_heads
from lkda.ops.kda.reference.chunk import kda_chunk
from lkda.ops.kda.reference.recurrent import kda_recurrent, kda_step_recurrent
from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.short_conv.op import l2_normalized

BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.kda_cuda, cuda.reason_cannot_run),
    "cuda_recurrent": Backend(cuda_recurrent.kda_cuda_recurrent, cuda_recurrent.reason_cannot_run, automatic=False),
    "cpu": Backend(cpu.kda_cpu, cpu.reason_cannot_run),
    "chunk": Backend(kda_chunk),
    "recurrent": Backend(kda_recurrent),
}
# Their kernels have K = V.
_SQUARE = ("cuda", "cuda_recurrent")


def kda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalized: bool = True,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal Kimi Delta Attention (arXiv:2510.26692, Eq. 1).

        S_t = (I - beta_t k_t k_t^T) Diag(exp g_t) S_{t-1} + beta_t k_t v_t^T,    o_t = scale * S_t^T q_t

    The result is exact for every gate from 0 to a hard reset (-inf); no lower bound on g is assumed.

    There may be more value heads than key heads: HV is H or a multiple of it, and value head i has key head
    i // (HV / H). The CUDA kernels have one key head for each value head and K = V. For other shapes q and k are
    repeated, and v is padded with zeros or cut into heads of size K, which costs as much as that many heads of K.

    Args:
        q, k: [B, T, H, K]; k has unit L2 norm over K, and in KDA so has q. For half-precision inputs the kernels
            multiply in float16: numbers of q above 65,504 overflow, and those below 6e-5 lose digits. v may have any
            size.
        v: [B, T, HV, V], of the dtype of q and k.
        g: [B, T, HV, K], log decay per token in nats, <= 0.
        beta: [B, T, HV], write strength in [0, 2].
        scale: the factor of the output; None for K^-0.5.
        initial_state: [B, HV, K, V], or [N, HV, K, V] with cu_seqlens; None for zeros.
        cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1); they may be empty.
        normalized: whether q and k have unit norm already; False divides them by their L2 norm first.
        recompute: whether the backward computes the workspaces of the CUDA kernels again instead of keeping them. Then
            the memory between forward and backward is smaller by 520 bytes per token and head for heads of 64, and by
            908 for heads of 128 (half precision), and the backward takes longer. The results are the same bits. Other
            backends keep no workspaces, so it has no effect on them.
        backend: auto | cuda | cuda_recurrent | cpu | chunk | recurrent.
    Returns: o [B, T, HV, V] in v's dtype, final_state [B or N, HV, K, V] in float32 (float64 for float64 inputs).
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    check_attention("kda_attention", q, k, v, g, beta, initial_state, cu_seqlens)
    word = backend_of("kda_attention", backend, q)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return attend(word, q, k, v, g, beta, scale, initial_state, cu_seqlens, normalized=normalized, recompute=recompute)


def attend(
    word: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    normalized: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Run the backend `word` on tensors that are checked. Arguments and results are those of `kda_attention`."""
    run: Callable[..., tuple[Tensor, Tensor]] = BACKENDS[word].run
    if word == "cuda":
        run = partial(run, normalize=not normalized, recompute=recompute)
    elif not normalized:
        q, k = l2_normalized(q, k)
    if v.shape[2] != q.shape[2]:
        q, k = repeat_heads(q, v.shape[2]), repeat_heads(k, v.shape[2])
    if word in _SQUARE and v.shape[3] != q.shape[3]:
        return in_square_heads(run, q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return run(q, k, v, g, beta, scale, initial_state, cu_seqlens)


def backend_of(fn: str, backend: str, q: Tensor) -> str:
    """The word of the backend that runs for q; "auto" means the fastest one that can."""
    return choose(fn, BACKENDS, backend, device=q.device, head_dim=q.shape[3], dtype=q.dtype)


def _usual(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> bool:
    """A quick test for the usual case. True means that `check_attention` would find no error; False means nothing."""
    return (
        q.dim() == 4
        and q.shape[1] > 0
        and alike(q, k, v, g)
        and k.dtype == q.dtype == v.dtype
        and beta.shape == q.shape[:3]
        and beta.device == q.device
        and beta.dtype.is_floating_point
    )


def check_attention(
    fn: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError if a shape, dtype or device does not fit."""
    if initial_state is None and cu_seqlens is None and _usual(q, k, v, g, beta):
        return
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B T H K", sizes)
    check_shape(fn, "k", k, "B T H K", sizes)
    heads = check_value_heads(fn, v, "B T", sizes)
    check_shape(fn, "g", g, f"B T {heads} K", sizes)
    check_shape(fn, "beta", beta, f"B T {heads}", sizes)
    if sizes["T"] == 0:
        raise InputError(f"{fn}: T must be at least 1, got q of {list(q.shape)}.")
    if cu_seqlens is not None:
        check_cu_seqlens(fn, cu_seqlens, sizes["B"], sizes["T"])
        sizes["N"] = len(cu_seqlens) - 1
    if initial_state is not None:
        rows = "B" if cu_seqlens is None else "N"
        check_shape(fn, "initial_state", initial_state, f"{rows} {heads} K V", sizes)
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    check_alike(fn, tensors, same_dtype=("q", "k", "v"))


def check_value_heads(fn: str, v: Tensor, axes: str, sizes: dict[str, int]) -> str:
    """Raises ValueError unless v is [`axes`, HV, V], where HV, its heads, is H, that of the keys, or a multiple of it.

    Returns: the letters of the value heads: "H" where there are as many, else "HV".
    """
    if v.dim() != len(axes.split()) + 2 or v.shape[-2] == sizes["H"]:
        check_shape(fn, "v", v, f"{axes} H V", sizes)
        return "H"
    check_shape(fn, "v", v, f"{axes} HV V", sizes)
    if not sizes["H"] or not sizes["HV"] or sizes["HV"] % sizes["H"]:
        raise InputError(
            f"{fn}: v must have as many heads as q and k, {sizes['H']}, or a multiple of that, got {list(v.shape)}."
        )
    return "HV"


def kda_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `kda_attention`, for decoding.

    Args:
        q, k: [B, H, K].   v: [B, HV, V].   g: [B, HV, K].   beta: [B, HV].
        state: [B, HV, K, V], float32 or float64.
        scale: the factor of the output; None for K^-0.5.
    Returns: o [B, HV, V] in v's dtype, and the state after the token, in the given state's dtype.
    Raises: ValueError if a shape, dtype or device does not fit.
    """
    fn = "kda_step"
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B H K", sizes)
    check_shape(fn, "k", k, "B H K", sizes)
    heads = check_value_heads(fn, v, "B", sizes)
    check_shape(fn, "g", g, f"B {heads} K", sizes)
    check_shape(fn, "beta", beta, f"B {heads}", sizes)
    check_shape(fn, "state", state, f"B {heads} K V", sizes)
    check_alike(fn, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}, same_dtype=("q", "k", "v"))
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if heads == "HV":
        q, k = (x.repeat_interleave(sizes["HV"] // sizes["H"], 1) for x in (q, k))
    dtype = torch.promote_types(compute_dtype(v), state.dtype)
    q_, k_, v_, g_, beta_, state_ = (x.to(dtype) for x in (q, k, v, g, beta, state))
    o, state_after = kda_step_recurrent(q_, k_, v_, g_, beta_, state_, scale)
    return o.to(v.dtype), state_after.to(state.dtype)
