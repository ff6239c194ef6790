"""Causal softmax attention: PyTorch's fused kernels, the quadratic form as its equation stands, and a naive kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_cu_seqlens, check_shape
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.sequences import lengths_of
from lkda.ops.sequences import longest as longest_of
from lkda.ops.softmax.cuda import naive as cuda_naive

# The most entries of a mask. PyTorch converts them to floats, so that this is 64 MB in float32.
MASK_ENTRIES = 2**24


def _naive(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes the whole T x S matrix of scores, in float32 or float64, for q [B, H, T, K], k [B, H, S, K] and v."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, S = q.shape[-2], k.shape[-2]
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = (scale * q.to(dtype) @ k.to(dtype).mT).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v.to(dtype)).to(v.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The memory that it needs beside the arguments is linear in T and S: q has the last T of S positions."""
    T, S = q.shape[-2], k.shape[-2]
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    if T == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if q.is_cuda and _takes_lower_right(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), scale=scale)
    # A mask is needed: of a block of queries at a time, with the keys that they see.
    blocks, seen, rows = [], S - T, max(1, MASK_ENTRIES // S)
    for queries in q.split(rows, -2):
        N, seen = queries.shape[-2], seen + queries.shape[-2]
        mask = torch.ones(N, seen, dtype=torch.bool, device=q.device).tril(seen - N)
        keys, values = k[..., :seen, :], v[..., :seen, :]
        blocks.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale))
    return torch.cat(blocks, -2)


def _takes_lower_right(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch has a kernel for queries that are the last positions. Otherwise it makes the whole T x S mask."""
    given = SDPAParams(q, k, v, None, 0.0, False, False)
    return can_use_flash_attention(given) or can_use_efficient_attention(given)


def _per_sequence(
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> Callable[[Tensor, Tensor, Tensor, float, Tensor | None, int | None], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cu_seqlens is None:
            return attend(q, k, v, scale).transpose(1, 2)
        lengths = lengths_of(1, q.shape[2], cu_seqlens)
        rows = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
        parts = [attend(q, k, v, scale) for q, k, v in rows if q.shape[2]]
        return torch.cat(parts, 2).transpose(1, 2)

    return run


def _sdpa_packed(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int | None
) -> Tensor:
    half = q.dtype in (torch.float16, torch.bfloat16)
    K, V = q.shape[-1], v.shape[-1]
    if cu_seqlens is None or not (q.is_cuda and half and V <= K <= 256 and K % 8 == 0):
        return _per_sequence(_sdpa)(q, k, v, scale, cu_seqlens, longest)
    # The kernel behind SDPA, called by its name, does all sequences in one launch. It needs K = V, so narrower values
    # are padded. It launches as many blocks for each sequence as for the longest, so the longest must be known.
    v = F.pad(v, (0, K - V))
    T = q.shape[1]
    bounds, most = cu_seqlens.to(torch.int32), longest_of(cu_seqlens, T) if longest is None else min(longest, T)
    o, *_ = torch.ops.aten._flash_attention_forward(
        q[0], k[0], v[0], bounds, bounds, most, most, 0.0, True, False, scale=scale
    )
    return o[..., :V].unsqueeze(0)


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa_packed),
    "naive": Backend(_per_sequence(_naive)),
    "cuda_naive": Backend(cuda_naive.softmax_cuda_naive, cuda_naive.reason_cannot_run, automatic=False),
}


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention, o_t = sum_{s <= t} softmax_s(scale q_t . k_s) v_s.

    Args:
        q: [B, T, H, K], the last T of S positions. T = S, unless keys come from a cache.
        k: [B, S, H, K].   v: [B, S, H, V].
        scale: the factor of the scores; None for K^-0.5.
        cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1, T = S); they may be empty.
        longest: an upper bound of the tokens of a packed sequence. None: it is read from cu_seqlens, for which the
            host waits for the GPU. A traced or captured call cannot read it and takes T, which launches idle blocks.
        backend: auto | sdpa | naive | cuda_naive. The last two are there to measure what they cost: naive computes the
            whole T x S matrix; cuda_naive is a kernel without tensor cores, on a GPU, and has no backward.
    Returns: o [B, T, H, V] in v's dtype.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "softmax_attention"
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B T H K", sizes)
    check_shape(fn, "k", k, "B S H K", sizes)
    check_shape(fn, "v", v, "B S H V", sizes)
    if not 1 <= sizes["T"] <= sizes["S"]:
        raise InputError(
            f"{fn}: q holds the last T of S positions, 1 <= T <= S; got T = {sizes['T']}, S = {sizes['S']}."
        )
    if cu_seqlens is not None:
        check_cu_seqlens(fn, cu_seqlens, sizes["B"], sizes["T"])
        if sizes["S"] != sizes["T"]:
            raise InputError(f"{fn}: with cu_seqlens q and k have one length, got T = {sizes['T']}, S = {sizes['S']}.")
    check_alike(fn, {"q": q, "k": k, "v": v}, same_dtype=("q", "k", "v"))
    scale = sizes["K"] ** -0.5 if scale is None else scale
    word = choose(fn, BACKENDS, backend, device=q.device, head_dim=sizes["K"], dtype=q.dtype)
    return BACKENDS[word].run(q, k, v, scale, cu_seqlens, longest)
