"""KDA as a layer calls it: from the logits of its projections, in a handful of kernel launches."""

from __future__ import annotations

from torch import Tensor

from lkda.ops.checks import check_alike, check_shape
from lkda.ops.kda.cuda.core import kda_cuda
from lkda.ops.kda.cuda.gate import kda_gate_cuda
from lkda.ops.kda.op import backend_of, check_attention, kda_attention
from lkda.ops.kda.reference.gate import KDAGate, kda_gate_torch
from lkda.ops.short_conv.op import l2_normalized


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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kda_attention` from the outputs of a KDA layer's projections.

    q and k are divided by their L2 norm per head, `gate` makes g and beta of the logits, then `kda_attention` follows.

    Args:
        q, k: [B, T, H, K].   v: [B, T, H, V], of the dtype of q and k.
        gate_logits: [B, T, H, K], or [B, T, H] for one decay per head; None for no decay.
        beta_logits: [B, T, H].
        gate: what turns the logits into g and beta.
        normalized: whether q and k already have unit norm, as `short_convolutions` can return them.
        scale, initial_state, cu_seqlens, backend: as in `kda_attention`.
    Returns: as `kda_attention`.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "kda_attention_fused"
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B T H K", sizes)
    check_shape(fn, "k", k, "B T H K", sizes)
    check_shape(fn, "v", v, "B T H V", sizes)
    check_shape(fn, "beta_logits", beta_logits, "B T H", sizes)
    given = {"q": q, "k": k, "v": v, "gate_logits": gate_logits, "beta_logits": beta_logits}
    check_alike(fn, given | {"A_log": gate.A_log, "dt_bias": gate.dt_bias}, same_dtype=("q", "k", "v"))
    gate.check(fn, gate_logits, sizes)
    word = backend_of(fn, backend, q, v)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if word == "cuda":
        logits = None if gate_logits is None else gate_logits.to(q.dtype)
        g, beta = kda_gate_cuda(logits, beta_logits.to(q.dtype), gate, head_dim=sizes["K"])
        check_attention(fn, q, k, v, g, beta, initial_state, cu_seqlens)
        return kda_cuda(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize=not normalized)
    if not normalized:
        q, k = l2_normalized(q, k)
    g, beta = kda_gate_torch(gate_logits, beta_logits, gate, head_dim=sizes["K"])
    return kda_attention(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=word
    )
