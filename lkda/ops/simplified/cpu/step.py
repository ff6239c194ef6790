"""The decoding step of simplified linear attention on a CPU: a call of step.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lkda.ops.runtime.cpp import NAMES, Library, contiguous_rows, cpu_only

LIBRARY = Library(Path(__file__).with_name("step.cpp"))

reason_cannot_run = cpu_only(LIBRARY, otherwise="torch", dtypes=NAMES)


def simplified_step_fused_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Tensor | None,
    bias: Tensor,
    state: Tensor,
    weights: Sequence[Tensor],
    caches: Sequence[Tensor],
) -> Tensor:
    """Arguments and result as of `simplified_step_fused`, already checked, and all of one dtype."""
    B, H, D = q.shape
    q, k, v = (contiguous_rows(x) for x in (q, k, v))
    logits = None if logits is None else contiguous_rows(logits)
    weights = [weight.contiguous() for weight in weights]
    o = q.new_empty(B, H, D)
    LIBRARY.call(
        f"simplified_step_{NAMES[q.dtype]}",
        *(B, H, D, q, k, v, q.stride(0), k.stride(0), v.stride(0)),
        *(logits, 0 if logits is None else logits.stride(0), bias.contiguous()),
        *(weights[0].shape[2] if weights else 0, *(weights or (None, None, None)), *(caches or (None, None, None))),
        *(state, o),
    )
    return o
