"""FLA's `chunk_kda` and `fused_recurrent_kda` in lkda's operators. Arguments have FLA's names and meaning.

This module does not import FLA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.ops import KDAGate, kda_attention, kda_chunk_states, kda_gate, kda_step_fused
from lkda.ops.kda.op import BACKENDS
from lkda.ops.kda.reference.gate import LOWEST_BOUND
from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.kernel_inputs import HEAD_DIMS

Arguments = dict[str, Any]


def names(*lines: str) -> frozenset[str]:
    """The words of some lines."""
    return frozenset(word for line in lines for word in line.split())


_BOTH = names(
    "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens A_log dt_bias",
)
CHUNK_ARGUMENTS = _BOTH | names(
    "safe_gate disable_recompute return_intermediate_states cu_seqlens_cpu cp_context use_graph max_num_seqs chunk_size"
)
RECURRENT_ARGUMENTS = _BOTH | names("inplace_final_state out ssm_state_indices num_accepted_tokens")
# Those that FLA's signatures need not name, since they may be in its **kwargs.
KEYWORDS = names("A_log dt_bias chunk_size")


def chunk_declined(given: Arguments) -> str | None:
    """Why lkda does not take a call of `chunk_kda`; None if it does."""
    if given["cp_context"] is not None:
        return "lkda has no context parallelism"
    if given["use_graph"]:
        return "lkda does not read the padded cu_seqlens of use_graph"
    if given.get("chunk_size", 64) not in (32, 64):
        return "FLA refuses this chunk_size"
    if given["return_intermediate_states"] and not torch.is_inference_mode_enabled():
        return "FLA refuses return_intermediate_states outside inference mode"
    state = given["initial_state"]
    if state is not None and state.dtype != torch.float32:
        return f"FLA refuses an initial_state of {state.dtype}"
    if given["safe_gate"] and given["use_gate_in_kernel"] and given["lower_bound"] is None:
        return "FLA refuses safe_gate without lower_bound"
    return _declined(given)


def recurrent_declined(given: Arguments) -> str | None:
    """Why lkda does not take a call of `fused_recurrent_kda_fwd`; None if it does."""
    if given["inplace_final_state"] or given["ssm_state_indices"] is not None:
        return "lkda does not write states in place or by index"
    if given["num_accepted_tokens"] is not None:
        return "lkda has no speculative decoding"
    return _declined(given)


def _declined(given: Arguments) -> str | None:
    q, k, v, g, beta = (given[name] for name in ("q", "k", "v", "g", "beta"))
    if q.dim() != 4 or v.dim() != 4 or not q.dtype == k.dtype == v.dtype:
        return f"lkda takes q, k and v of four axes and one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    B, T, H, K = q.shape
    HV = v.shape[2]
    if not T:
        return "lkda takes one token at least"
    if k.shape != q.shape or v.shape[:2] != (B, T) or not H or HV % H:
        return f"the shapes of q, k and v do not fit: {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    if g.shape != (B, T, HV, K) or beta.shape != (B, T, HV):
        return f"lkda takes g {[B, T, HV, K]} and beta {[B, T, HV]}, got {list(g.shape)} and {list(beta.shape)}"
    if given["allow_neg_eigval"] and not given["use_beta_sigmoid_in_kernel"]:
        return "FLA refuses allow_neg_eigval without use_beta_sigmoid_in_kernel"
    if given["use_gate_in_kernel"]:
        lowest = given["lower_bound"]
        if lowest is None and given.get("A_log") is None:
            return "FLA refuses use_gate_in_kernel without A_log and lower_bound"
        if lowest is not None and not LOWEST_BOUND <= lowest < 0:
            return f"lkda takes a lower_bound in [{LOWEST_BOUND:g}, 0), got {lowest}"
    return BACKENDS["cuda"].cannot_run(q.device, _kernel_head(K), q.dtype) if q.is_cuda else None


def _kernel_head(K: int) -> int:
    """The smallest size of a head that the kernels have and that K channels fit into; K if there is none."""
    return next((size for size in HEAD_DIMS if size >= K), K)


def with_wider_heads(given: Arguments, K: int) -> Arguments:
    """The arguments with heads of K channels instead of fewer: zeros in q and k make the others of no effect.

    The states then have K rows, of which the additional ones are zero.
    """
    had = given["q"].shape[3]
    more = K - had
    wider = {name: F.pad(given[name], (0, more)) for name in ("q", "k", "g")}
    state, bias = given["initial_state"], given.get("dt_bias")
    if state is not None:
        wider["initial_state"] = F.pad(state, (0, more) if given["state_v_first"] else (0, 0, 0, more))
    if bias is not None:
        wider["dt_bias"] = F.pad(bias.reshape(-1, had), (0, more)).flatten()
    return given | wider | {"scale": had**-0.5 if given["scale"] is None else given["scale"]}


def chunk(given: Arguments) -> tuple[Tensor | None, ...]:
    """`chunk_kda`: o, the final state, and with return_intermediate_states the states before each chunk in bf16.

    Heads of a size that the kernels do not have are computed as the next larger ones.
    """
    q = given["q"]
    K = q.shape[3]
    if q.is_cuda and _kernel_head(K) != K:
        given = with_wider_heads(given, _kernel_head(K))
    return _chunk(given, K)


def _chunk(given: Arguments, K: int) -> tuple[Tensor | None, ...]:
    """As `chunk`, for heads that the kernels have. The states have the first K rows."""
    g, beta = _gates(given)
    inputs = (given["q"], given["k"], given["v"], g, beta)
    options = {name: given[name] for name in ("scale", "cu_seqlens")}
    options |= {"initial_state": _k_first(given), "normalized": not given["use_qk_l2norm_in_kernel"]}
    if not given["return_intermediate_states"]:
        o, final_state = kda_attention(*inputs, **options)
        return o, _final(given, final_state[..., :K, :])
    o, final_state, states = kda_chunk_states(*inputs, **options, chunk_size=given.get("chunk_size", 64))
    return o, _final(given, final_state[..., :K, :]), _in_requested_layout(given, states[..., :K, :].bfloat16())


@torch.no_grad()
def recurrent(given: Arguments) -> tuple[Tensor, Tensor | None]:
    """`fused_recurrent_kda_fwd`: o and the final state."""
    o, final_state = _step(given) if _is_one_step(given) else chunk(given | {"return_intermediate_states": False})
    assert o is not None
    out = given["out"]
    return o if out is None else out.copy_(o), final_state


def _is_one_step(given: Arguments) -> bool:
    """Whether lkda's decoding step, one kernel from the logits, computes the call."""
    q, v = given["q"], given["v"]
    from_logits = given["use_gate_in_kernel"] and given["use_beta_sigmoid_in_kernel"]
    return from_logits and q.shape[1] == 1 and given["cu_seqlens"] is None and q.shape == v.shape


def _step(given: Arguments) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, beta = (given[name][:, 0] for name in ("q", "k", "v", "g", "beta"))
    B, H, K = q.shape
    before, dtype = _k_first(given), compute_dtype(q)
    if before is None:
        state = torch.zeros(B, H, K, K, dtype=dtype, device=q.device)
    else:  # a copy, since the step writes in place; FLA's final state is in float32, whatever the initial one is in
        state = before.to(dtype, copy=True, memory_format=torch.contiguous_format)
    normalized = not given["use_qk_l2norm_in_kernel"]
    o = kda_step_fused(q, k, v, g, beta, _gate(given), (state,), normalized=normalized, scale=given["scale"])
    return o.unsqueeze(1), _final(given, state)


def _gate(given: Arguments) -> KDAGate:
    """The gate of the arguments. Without A_log the factor is 1, and without dt_bias the bias 0."""
    HV, K = given["g"].shape[2:]
    A_log, dt_bias, lowest = given.get("A_log"), given.get("dt_bias"), given["lower_bound"]
    if A_log is None:
        A_log = given["g"].new_zeros(HV, dtype=torch.float32)
    if dt_bias is None:
        dt_bias = given["g"].new_zeros(HV * K, dtype=torch.float32)
    form = {"form": "softplus"} if lowest is None else {"form": "bounded", "lower_bound": float(lowest)}
    return KDAGate(A_log.flatten(), dt_bias.flatten(), **form, negative_eigenvalues=given["allow_neg_eigval"])


def _gates(given: Arguments) -> tuple[Tensor, Tensor]:
    """g [B, T, HV, K] in nats and beta [B, T, HV], as `kda_attention` takes them."""
    g, beta = given["g"], given["beta"]
    if given["use_gate_in_kernel"]:
        g, strength = kda_gate(g, beta, _gate(given))
        return g, strength if given["use_beta_sigmoid_in_kernel"] else beta
    if given["use_beta_sigmoid_in_kernel"]:
        beta = torch.sigmoid(beta.to(compute_dtype(beta))) * (2 if given["allow_neg_eigval"] else 1)
    return g, beta


def _k_first(given: Arguments) -> Tensor | None:
    """The initial state as [N, HV, K, V]."""
    state: Tensor | None = given["initial_state"]
    return state if state is None or not given["state_v_first"] else state.mT


def _final(given: Arguments, state: Tensor) -> Tensor | None:
    """The final state if it is requested."""
    return _in_requested_layout(given, state) if given["output_final_state"] else None


def _in_requested_layout(given: Arguments, state: Tensor) -> Tensor:
    """A state [..., K, V] in the requested order of axes."""
    return state.mT.contiguous() if given["state_v_first"] else state
