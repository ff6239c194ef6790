"""The decoding step of simplified linear attention as a layer calls it: from one token's projections to o; state and
caches change in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_in_place, check_shape, check_step_caches
from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.short_conv.reference import convolve_step_torch
from lkda.ops.simplified.cpu import step as cpu
from lkda.ops.simplified.cuda import fused_step as cuda
from lkda.ops.simplified.reference.recurrent import EPS


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    bias: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
) -> Tensor:
    """The step in PyTorch, in float32 at least: the definition that the kernel is compared with."""
    dtype, out_dtype = torch.promote_types(compute_dtype(v), state.dtype), v.dtype
    heads = [x.to(dtype) for x in (q, k, v)]
    for i, (weight, cache) in enumerate(zip(weights, caches)):
        heads[i] = convolve_step_torch(heads[i], weight, cache)
    q, k, v = heads
    bias = bias.to(dtype)
    b = torch.sigmoid(bias if logits is None else logits.to(dtype) + bias)
    after = state.to(dtype)  # the state itself where it has this dtype
    after.mul_(b[..., None, None])
    num, den = after.unbind(-2)
    write = torch.sigmoid(k)
    num.addcmul_(write, v)
    den.add_(write)
    if after is not state:
        state.copy_(after)
    return (num / (den + EPS)).mul_(q).to(out_dtype)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.simplified_step_fused_cuda, cuda.reason_cannot_run),
    "cpu": Backend(cpu.simplified_step_fused_cpu, cpu.reason_cannot_run),
    "torch": Backend(_torch),
}


@torch.no_grad()
def simplified_step_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    bias: Tensor,
    state: Tensor,
    *,
    weights: Sequence[Tensor] = (),
    caches: Sequence[Tensor] = (),
    backend: str = "auto",
) -> Tensor:
    """One token of a layer of simplified linear attention between its projections, without gradients.

    State and caches are updated IN PLACE. With weights, q, k and v go through the short convolution with SiLU first.
    Then it does what `simplified_step` does with the decay sigmoid(logits + bias). On a GPU that is one kernel launch,
    which a CUDA graph can capture; on a CPU it is one call of C++, if there is a compiler. The bits of a sequence's
    result do not depend on its place in the batch.

    Args:
        q, k, v: [B, H, D] of one dtype; they may be parts of longer rows.
        logits: of the decay, [B, H]; None for a decay that does not depend on the token.
        bias: of the decay, [H].
        state: [B, H, 2, D] (num, den) in float32 or float64; contiguous.
        weights: of the convolutions of q, k and v, [H * D, 1, width] each; empty for no convolution.
        caches: the last inputs of the convolutions, [B, width - 1, H * D] each, as `short_convolutions` returns them;
            contiguous.
        backend: auto | cuda | cpu | torch.
    Returns: o [B, H, D] in v's dtype.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "simplified_step_fused"
    sizes: dict[str, int] = {"2": 2}
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_shape(fn, name, x, "B H D", sizes)
    if logits is not None:
        check_shape(fn, "logits", logits, "B H", sizes)
    check_shape(fn, "bias", bias, "H", sizes)
    check_shape(fn, "state", state, "B H 2 D", sizes)
    check_alike(fn, {"q": q, "k": k, "v": v, "logits": logits, "bias": bias}, same_dtype=("q", "k", "v"))
    if state.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{fn}: state must be float32 or float64, got {state.dtype}.")
    check_in_place(fn, {"state": state}, q.device)
    check_step_caches(fn, weights, caches, q.device, sizes)
    able = dict(BACKENDS)
    if state.dtype == torch.float64 or sizes.get("W", 1) > cuda.MAX_TAPS:
        del able["cuda"]
    if any(x is not None and x.dtype != q.dtype for x in (logits, bias, state, *weights, *caches)):
        del able["cpu"]
    word = choose(fn, able, backend, device=q.device, head_dim=sizes["D"], dtype=q.dtype)
    o: Tensor = BACKENDS[word].run(q, k, v, logits, bias, state, weights, caches)
    return o
