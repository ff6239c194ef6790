"""KDA's decoding step on a CPU: a call of step.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.kda.reference.gate import KDAGate
from lkda.ops.runtime.cpp import NAMES, Library, contiguous_rows, cpu_only

LIBRARY = Library(Path(__file__).with_name("step.cpp"))
NO_DECAY, PER_CHANNEL, PER_HEAD = range(3)  # as in the .cpp file

reason_cannot_run = cpu_only(LIBRARY, otherwise="torch", dtypes=NAMES)


def of_one_dtype(q: Tensor, *others: Tensor | None) -> bool:
    """Whether the C++ can take these tensors: all of the dtype of q."""
    return all(x is None or x.dtype == q.dtype for x in others)


def kda_step_cpu(
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
    """Arguments and result as of the form in PyTorch, all of one dtype, with a state that has no factors."""
    B, H, D = q.shape
    q, k, v, beta_logits = (contiguous_rows(x) for x in (q, k, v, beta_logits))
    kind = NO_DECAY if gate_logits is None else PER_HEAD if gate_logits.dim() == 2 else PER_CHANNEL
    logits = None if gate_logits is None else contiguous_rows(gate_logits)
    o = q.new_empty(B, H, D)
    LIBRARY.call(
        f"kda_step_{NAMES[q.dtype]}",
        *(B, H, D, q, k, v, q.stride(0), k.stride(0), v.stride(0)),
        *(kind, logits, 0 if logits is None else logits.stride(0), beta_logits, beta_logits.stride(0)),
        *(gate.A_log, gate.dt_bias, int(gate.bounded), float(gate.lower_bound), gate.strength),
        *(weights[0].shape[2] if weights else 0, *(weights or (None, None, None)), *(caches or (None, None, None))),
        *(int(normalize), float(scale), state, o, torch.get_num_threads()),
    )
    return o
