"""Softmax attention's decoding step as a layer calls it: from a token's q, k and v to o; the caches change in place."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_shape
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.softmax.cpu import step as cpu
from lkda.ops.softmax.cuda import step as cuda
from lkda.ops.softmax.rotary import rotate


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    rope_base: float | None,
    scale: float,
) -> Tensor:
    """The step in PyTorch, in float32 at least: the definition that the kernels are compared with."""
    S, position, dtype = k_cache.shape[2], lengths.unsqueeze(1), torch.promote_types(q.dtype, torch.float32)
    q, k = (rotate(x.to(dtype).unsqueeze(1), position, rope_base).squeeze(1) for x in (q, k))
    place = position.clamp(max=S - 1)
    for cache, new in ((k_cache, k), (v_cache, v)):
        at = place[..., None, None].expand(-1, cache.shape[1], 1, cache.shape[3])
        cache.scatter_(2, at, new.unsqueeze(2).to(cache.dtype))
    scores = scale * torch.matmul(k_cache.to(dtype), q.unsqueeze(-1)).squeeze(-1)
    seen = torch.arange(S, device=q.device) <= place
    weights = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.matmul(weights.unsqueeze(2), v_cache.to(dtype)).squeeze(2).to(v.dtype)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.softmax_step_cuda, cuda.reason_cannot_run),
    "cpu": Backend(cpu.softmax_step_cpu, cpu.reason_cannot_run),
    "torch": Backend(_torch),
}
# For what the kernels and the C++ cannot do: caches of another dtype than q, k and v.
_WITHOUT_KERNEL = {"torch": BACKENDS["torch"]}


def has_kernel(q: Tensor, cache: Tensor) -> bool:
    """Whether `softmax_step` runs its kernels for q [B, H, D] and a cache, which is faster than other ways."""
    return q.is_cuda and q.dtype == cache.dtype and cuda.reason_cannot_run(q.device, q.shape[-1], q.dtype) is None


@torch.no_grad()
def softmax_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    rope_base: float | None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of softmax attention with rotary positions, without gradients. The caches are updated IN PLACE.

    q and k of each sequence are rotated at the position n = `lengths` of the token. k and v are written into the caches
    at n, or over the last token of a full cache. Then o = sum_{s <= n} softmax_s(scale q . k_s) v_s. On a GPU that is
    one kernel launch, or two, and a CUDA graph can capture it; on a CPU it is one call of C++, if there is a compiler.
    The bits of a sequence's result do not depend on its place in the batch.

    Args:
        q, k, v: [B, H, D] of one dtype, not rotated.
        k_cache, v_cache: [B, H, S, D], of which each sequence has the first `lengths` tokens; of one layout, in which
            the tokens of a head follow one another, as in the first S tokens of larger caches.
        lengths: int64 [B], the tokens of each sequence before this one. They are not changed.
        rope_base: of the rotary frequencies; None for no rotation.
        scale: the factor of the scores; None for D^-0.5.
        backend: auto | cuda | cpu | torch.
    Returns: o [B, H, D] in v's dtype.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "softmax_step"
    sizes: dict[str, int] = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(fn, name, x, "B H D", sizes)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_shape(fn, name, x, "B H S D", sizes)
    given: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    check_alike(fn, given, same_dtype=("q", "k", "v"))
    check_shape(fn, "lengths", lengths, "B", sizes)
    if sizes["D"] % 2:
        raise InputError(f"{fn}: rotary positions turn pairs of channels, so D must be even, got {sizes['D']}.")
    if lengths.dtype != torch.int64 or lengths.device != q.device:
        raise InputError(f"{fn}: lengths must be int64 on {q.device}, got {lengths.dtype} on {lengths.device}.")
    _check_caches(fn, k_cache, v_cache)
    fits = k_cache.dtype == v_cache.dtype == q.dtype
    word = choose(
        fn, BACKENDS if fits else _WITHOUT_KERNEL, backend, device=q.device, head_dim=sizes["D"], dtype=q.dtype
    )
    o: Tensor = BACKENDS[word].run(
        *(q, k, v, k_cache, v_cache, lengths.contiguous()),
        rope_base=rope_base,
        scale=sizes["D"] ** -0.5 if scale is None else scale,
    )
    return o


def _check_caches(fn: str, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.stride() != v_cache.stride():
        raise InputError(
            f"{fn}: k_cache and v_cache have one layout, got strides of {k_cache.stride()} and {v_cache.stride()}."
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not x[0, 0].is_contiguous() or (x.is_cuda and x.data_ptr() % 16):
            raise InputError(
                f"{fn}: {name} is written in place; the tokens of a head must follow one another, aligned to 16 bytes."
            )
