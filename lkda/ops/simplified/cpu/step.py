"""The decoding step of simplified linear attention on a CPU: a call of step.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lkda.ops.runtime.cpp import NAMES, Library

LIBRARY = Library(Path(__file__).with_name("step.cpp"))

runs = LIBRARY.can_take


def simplified_step_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay_logits: Tensor | None,
    decay_bias: Tensor,
    state: Tensor,
    *,
    weights: Sequence[Tensor] = (),
    caches: Sequence[Tensor] = (),
) -> Tensor:
    """One token, from a layer's projections to o [B, H, D]. State and caches are changed in place.

    Args:
        q, k, v: [B, H, D], whose rows may lie apart.
        decay_logits: [B, H]; None where the decay is constant. The decay is sigmoid(decay_logits + decay_bias).
        decay_bias: [H].
        state: [B, H, 2, D], contiguous.
        weights, caches: of the convolutions of q, k and v, as of `kda_step_fused`; empty for no convolution.
    """
    B, H, D = q.shape
    o = q.new_empty(B, H, D)
    LIBRARY.call(
        f"simplified_step_{NAMES[q.dtype]}",
        *(B, H, D, q, k, v, q.stride(0), k.stride(0), v.stride(0)),
        *(decay_logits, 0 if decay_logits is None else decay_logits.stride(0), decay_bias),
        *(weights[0].shape[2] if weights else 0, *(weights or (None, None, None)), *(caches or (None, None, None))),
        *(state, o),
    )
    return o
