"""KDA as the layer calls it: from raw logits, in a handful of launches."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_shape
from lkda.ops.kda.cuda.core import kda_cuda
from lkda.ops.kda.cuda.gate import kda_gate_cuda
from lkda.ops.kda.op import backend_of, check_attention, kda_attention
from lkda.ops.kda.reference.gate import FORMS, log_decay, write_strength
from lkda.ops.short_conv.op import l2_normalized


def kda_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor | None,
    beta_logits: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    *,
    gate: str = "softplus",
    lower_bound: float = -5.0,
    negative_eigenvalues: bool = False,
    normalized: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`kda_attention` from what the layer's projections give.

        q, k = q / |q|, k / |k| over heads         beta = sigmoid(beta_logits), or 2 sigmoid(beta_logits)
        g = -exp(A_log) softplus(gate_logits + dt_bias), or lower_bound sigmoid(exp(A_log) (gate_logits + dt_bias))

    Args:
        q, k: [B, T, H, K].   v: [B, T, H, V], of the dtype of q and k.
        gate_logits: [B, T, H, K], or [B, T, H] for one decay a head; None: no decay, and no A_log and dt_bias.
        beta_logits: [B, T, H].
        A_log: of H numbers, in any shape.   dt_bias: as many numbers as the gate has logits a token.
        gate: "softplus" or "bounded", the form of g.
        lower_bound: of g in the bounded form, in [-5, 0).
        negative_eigenvalues: beta in [0, 2] instead of [0, 1].
        normalized: whether q and k already are of unit norm, as `short_convolutions` can give them.
        scale, initial_state, cu_seqlens, backend: as in `kda_attention`.
    Returns: as `kda_attention`.
    Raises: ValueError where a shape, dtype or device does not fit, naming the one that does not.
    """
    fn = "kda_attention_fused"
    sizes: dict[str, int] = {}
    check_shape(fn, "q", q, "B T H K", sizes)
    check_shape(fn, "k", k, "B T H K", sizes)
    check_shape(fn, "v", v, "B T H V", sizes)
    check_shape(fn, "beta_logits", beta_logits, "B T H", sizes)
    check_alike(
        fn,
        {"q": q, "k": k, "v": v, "gate_logits": gate_logits, "beta_logits": beta_logits}
        | {"A_log": A_log, "dt_bias": dt_bias},
        same_dtype=("q", "k", "v"),
    )
    check_gate(fn, sizes, gate_logits, A_log, dt_bias, gate, lower_bound)
    word = backend_of(fn, backend, q, v)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    if word == "cuda":
        g, beta = kda_gate_cuda(
            None if gate_logits is None else gate_logits.to(q.dtype),
            beta_logits.to(q.dtype),
            A_log,
            dt_bias,
            head_dim=sizes["K"],
            bounded=gate == "bounded",
            lower_bound=lower_bound,
            strength=2.0 if negative_eigenvalues else 1.0,
        )
        check_attention(fn, q, k, v, g, beta, initial_state, cu_seqlens)
        return kda_cuda(q, k, v, g, beta, scale, initial_state, cu_seqlens, normalize=not normalized)
    if not normalized:
        q, k = l2_normalized(q, k)
    g = plain_decay(gate_logits, A_log, dt_bias, beta_logits, sizes["K"], gate, lower_bound)
    beta = write_strength(beta_logits, negative_eigenvalues=negative_eigenvalues)
    return kda_attention(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=word
    )


def check_gate(
    fn: str,
    sizes: dict[str, int],
    logits: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    gate: str,
    lower_bound: float,
) -> None:
    if gate not in FORMS:
        raise InputError(f"{fn}: gate must be one of {', '.join(FORMS)}, got {gate!r}.")
    if not -5 <= lower_bound < 0:
        raise InputError(f"{fn}: lower_bound must be in [-5, 0), got {lower_bound}.")
    if (logits is None) != (A_log is None) or (logits is None) != (dt_bias is None):
        raise InputError(f"{fn}: gate_logits, A_log and dt_bias come together, or none of them (no decay).")
    if logits is None or A_log is None or dt_bias is None:
        return
    check_shape(fn, "gate_logits", logits, "B T H" if logits.dim() == 3 else "B T H K", sizes)
    wanted = sizes["H"] if logits.dim() == 3 else sizes["H"] * sizes["K"]
    if A_log.numel() != sizes["H"] or dt_bias.numel() != wanted:
        raise InputError(
            f"{fn}: A_log must hold {sizes['H']} numbers and dt_bias {wanted}, "
            f"got {list(A_log.shape)} and {list(dt_bias.shape)}."
        )


def plain_decay(
    logits: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    beta_logits: Tensor,
    head_dim: int,
    gate: str,
    lower_bound: float,
) -> Tensor:
    if logits is None or A_log is None or dt_bias is None:
        dtype = torch.promote_types(beta_logits.dtype, torch.float32)
        return torch.zeros(*beta_logits.shape, head_dim, device=beta_logits.device, dtype=dtype)
    logits = logits.unsqueeze(-1) if logits.dim() == 3 else logits
    return log_decay(logits, A_log, dt_bias, head_dim=head_dim, gate=gate, lower_bound=lower_bound)
