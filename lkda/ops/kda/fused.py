"""KDA as a layer calls it: from the logits of its projections, in a handful of kernel launches."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.ops.checks import check_alike, check_shape
from lkda.ops.kda.cuda.gate import kda_gate_cuda
from lkda.ops.kda.op import attend, backend_of, check_attention, check_value_heads
from lkda.ops.kda.reference.gate import KDAGate, kda_gate_torch
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.runtime.kernel_inputs import cannot_take


def kda_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    gate: KDAGate,
    *,
    normalized: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    recompute: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kda_attention` from the outputs of a KDA layer's projections.

    q and k are divided by their L2 norm per head, `gate` makes g and beta of the logits, then `kda_attention` follows.

    Args:
        q, k: [B, T, H, K].   v: [B, T, HV, V], of the dtype of q and k, with HV as in `kda_attention`.
        gate_logits: [B, T, HV, K], or [B, T, HV] for one decay per head; None for no decay.
        beta_logits: [B, T, HV].
        gate: what turns the logits into g and beta, with parameters for HV heads.
        normalized: whether q and k already have unit norm, as `short_convolutions` can return them.
        scale, initial_state, cu_seqlens, recompute, backend: as in `kda_attention`.
    Returns: as `kda_attention`.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "kda_attention_fused"
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B T H K", sizes)
    check_shape(fn, "k", k, "B T H K", sizes)
    heads = check_value_heads(fn, v, "B T", sizes)
    check_shape(fn, "beta_logits", beta_logits, f"B T {heads}", sizes)
    given = {"q": q, "k": k, "v": v, "gate_logits": gate_logits, "beta_logits": beta_logits}
    check_alike(fn, given | {"A_log": gate.A_log, "dt_bias": gate.dt_bias}, same_dtype=("q", "k", "v"))
    gate.check(fn, gate_logits, sizes | {"H": v.shape[2]})
    word = backend_of(fn, backend, q)
    scale = sizes["K"] ** -0.5 if scale is None else float(scale)
    if word == "cuda":
        logits = None if gate_logits is None else gate_logits.to(q.dtype)
        g, beta = kda_gate_cuda(logits, beta_logits.to(q.dtype), gate, head_dim=sizes["K"])
    else:
        g, beta = kda_gate_torch(gate_logits, beta_logits, gate, head_dim=sizes["K"])
    check_attention(fn, q, k, v, g, beta, initial_state, cu_seqlens)
    return attend(word, q, k, v, g, beta, scale, initial_state, cu_seqlens, normalized=normalized, recompute=recompute)


def kda_gate(
    gate_logits: Tensor, beta_logits: Tensor, gate: KDAGate, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The log decay g and the write strength beta of `kda_attention`, from logits, in one kernel launch.

    Args:
        gate_logits: [B, T, H, K].
        beta_logits: [B, T, H]. If the dtypes differ, both are computed on in the wider one.
        gate: what turns the logits into g and beta.
        backend: auto | cuda | torch.
    Returns: g [B, T, H, K] in nats and beta [B, T, H], in float32 (float64 for float64 logits).
    Raises: ValueError if a shape or device does not fit; the message names the tensor.
    """
    fn = "kda_gate"
    sizes: dict[str, int] = {}
    check_shape(fn, "gate_logits", gate_logits, "B T H K", sizes)
    check_shape(fn, "beta_logits", beta_logits, "B T H", sizes)
    given: dict[str, Tensor | None] = {"gate_logits": gate_logits, "beta_logits": beta_logits}
    check_alike(fn, given | {"A_log": gate.A_log, "dt_bias": gate.dt_bias}, same_dtype=())
    gate.check(fn, gate_logits, sizes)
    dtype = torch.promote_types(gate_logits.dtype, beta_logits.dtype)
    word = choose(fn, _GATES, backend, device=gate_logits.device, head_dim=sizes["K"], dtype=dtype)
    return _GATES[word].run(gate_logits.to(dtype), beta_logits.to(dtype), gate, head_dim=sizes["K"])


_GATES = {"cuda": Backend(kda_gate_cuda, cannot_take(otherwise="torch")), "torch": Backend(kda_gate_torch)}
