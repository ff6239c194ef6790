"""KDA's decoding step as a layer calls it: from one token's projections to o; state and caches change in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_in_place, check_shape, check_step_caches
from lkda.ops.kda.cpu import step as cpu_step
from lkda.ops.kda.cuda import step as cuda_step
from lkda.ops.kda.reference.gate import KDAGate, kda_gate_torch
from lkda.ops.kda.state import STATE_DTYPES, pack_state, unpack_state
from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.short_conv.reference import convolve_step_torch, normalize_torch


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    gate: KDAGate,
    state: Tensor,
    factors: Tensor | None,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
    *,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The step in PyTorch, in float32 at least: the definition that the kernel is compared with."""
    dtype = torch.promote_types(compute_dtype(v), torch.float64 if state.dtype == torch.float64 else torch.float32)
    out_dtype = v.dtype
    heads = [x.to(dtype) for x in (q, k, v)]
    for i, (weight, cache) in enumerate(zip(weights, caches)):
        heads[i] = convolve_step_torch(heads[i], weight, cache)
    if normalize:
        heads[0], heads[1] = normalize_torch(heads[0]), normalize_torch(heads[1])
    g, beta = (x.to(dtype) for x in kda_gate_torch(gate_logits, beta_logits, gate, head_dim=q.shape[-1]))
    q, k, v = heads
    if state.dtype == dtype:
        return _step_in_place(q, k, v, g, beta, state, scale).to(out_dtype)
    kept = (state,) if factors is None else (state, factors)
    wide = unpack_state(kept).to(dtype)
    o = _step_in_place(q, k, v, g, beta, wide, scale)
    for before, new in zip(kept, pack_state(wide, state.dtype), strict=True):
        before.copy_(new)
    return o.to(out_dtype)


def _step_in_place(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    """`kda_step_recurrent`, with `state` updated in place. Returns o."""
    state.mul_(g.exp().unsqueeze(-1))
    correction = beta.unsqueeze(-1) * (v - torch.matmul(k.unsqueeze(-2), state).squeeze(-2))
    state.addcmul_(k.unsqueeze(-1), correction.unsqueeze(-2))
    return torch.matmul(q.unsqueeze(-2), state).squeeze(-2).mul_(scale)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda_step.kda_step_cuda, cuda_step.reason_cannot_run),
    "cpu": Backend(cpu_step.kda_step_cpu, cpu_step.reason_cannot_run),
    "torch": Backend(_torch),
}


@torch.no_grad()
def kda_step_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    gate: KDAGate,
    state: tuple[Tensor, ...],
    *,
    weights: Sequence[Tensor] = (),
    caches: Sequence[Tensor] = (),
    normalized: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of a KDA layer between its projections, without gradients. State and caches are updated IN PLACE.

    With weights, q, k and v go through the short convolution with SiLU first. Then it does what `kda_attention_fused`
    does. On a GPU that is one kernel launch, which a CUDA graph can capture. The bits of a sequence's result do not
    depend on its place in the batch.

    Args:
        q, k, v: [B, H, D] of one dtype.
        gate_logits: [B, H, D], or [B, H] for one decay per head; None for no decay.
        beta_logits: [B, H].
        gate: what turns the logits into g and beta.
        state: ([B, H, D, D],) in float32, float64 or bf16, or (int8 [B, H, D, D], float32 [B, H, D]), as
            `lkda.ops.kda.state.pack_state` returns it; contiguous.
        weights: of the convolutions of q, k and v, [H * D, 1, width] each; empty for no convolution.
        caches: the last inputs of the convolutions, [B, width - 1, H * D] each, as `short_convolutions` returns them;
            contiguous.
        normalized, scale: as in `kda_attention_fused`.
        backend: auto | cuda | cpu | torch.
    Returns: o [B, H, D] in v's dtype.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "kda_step_fused"
    sizes: dict[str, int] = {"1": 1}
    check_shape(fn, "q", q, "B H D", sizes)
    check_shape(fn, "k", k, "B H D", sizes)
    if v.dim() == 3 and v.shape[0] == sizes["B"] and v.shape != q.shape:
        raise InputError(
            f"{fn}: v must have as many heads as q and of the same size, {list(q.shape)}, got {list(v.shape)}; "
            "for other heads call `kda_gate` and `kda_step`."
        )
    check_shape(fn, "v", v, "B H D", sizes)
    check_shape(fn, "beta_logits", beta_logits, "B H", sizes)
    given = {"q": q, "k": k, "v": v, "gate_logits": gate_logits, "beta_logits": beta_logits}
    given |= {"A_log": gate.A_log, "dt_bias": gate.dt_bias}
    check_alike(fn, given, same_dtype=("q", "k", "v"))
    sequence = None if gate_logits is None else gate_logits.unsqueeze(1)
    gate.check(fn, sequence, sizes | {"T": 1, "K": sizes["D"]})
    _check_state(fn, state, q.device, sizes)
    check_step_caches(fn, weights, caches, q.device, sizes)
    able = dict(BACKENDS)
    if state[0].dtype == torch.float64 or sizes.get("W", 1) > cuda_step.MAX_TAPS:
        del able["cuda"]
    if not cpu_step.of_one_dtype(q, gate_logits, beta_logits, gate.A_log, gate.dt_bias, *state, *weights, *caches):
        del able["cpu"]
    word = choose(fn, able, backend, device=q.device, head_dim=sizes["D"], dtype=q.dtype)
    return BACKENDS[word].run(
        *(q, k, v, gate_logits, beta_logits, gate),
        *(state[0], state[1] if len(state) == 2 else None, weights, caches),
        normalize=not normalized,
        scale=sizes["D"] ** -0.5 if scale is None else float(scale),
    )


def _check_state(fn: str, state: tuple[Tensor, ...], device: torch.device, sizes: dict[str, int]) -> None:
    dtypes = {*STATE_DTYPES.values(), torch.float64}
    if not isinstance(state, tuple) or not state or state[0].dtype not in dtypes:
        got = state[0].dtype if isinstance(state, tuple) and state else type(state).__name__
        raise InputError(
            f"{fn}: state must be a tuple that begins with a tensor of {sorted(map(str, dtypes))}, got {got}."
        )
    if len(state) != 1 + (state[0].dtype == torch.int8):
        raise InputError(f"{fn}: an int8 state comes with its factors, any other alone; got {len(state)} tensors.")
    sizes["K"] = sizes["D"]
    check_shape(fn, "state[0]", state[0], "B H K D", sizes)
    if len(state) == 2:
        check_shape(fn, "state[1]", state[1], "B H K", sizes)
        if state[1].dtype != torch.float32:
            raise InputError(f"{fn}: state[1], the factors, must be float32, got {state[1].dtype}.")
    check_in_place(fn, {f"state[{i}]": x for i, x in enumerate(state)}, device)
