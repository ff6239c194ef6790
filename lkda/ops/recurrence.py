"""What the recurrent forms share: the dtype that they compute in, and the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkda.ops.sequences import lengths_of

Step = Callable[..., tuple[Tensor, Tensor]]


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision and float32 inputs, float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def run_tokens(step: Step, inputs: Sequence[Tensor], state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs `step(*inputs at t, state) -> (o at t, state)` over every token of every sequence.

    Args:
        inputs: tensors [B, T, ...].
        state: [B, ...], or [N, ...] with cu_seqlens.
    Returns: o [B, T, ...], and the state after the last token of each sequence.
    """

    def scan(rows: Sequence[Tensor], state: Tensor) -> tuple[list[Tensor], Tensor]:
        outputs = []
        for token in zip(*(x.unbind(1) for x in rows)):
            o, state = step(*token, state)
            outputs.append(o)
        return outputs, state

    if cu_seqlens is None:
        outputs, state = scan(inputs, state)
        return torch.stack(outputs, 1), state
    outputs, states = [], []
    lengths = lengths_of(1, inputs[0].shape[1], cu_seqlens)
    for n, rows in enumerate(zip(*(x.split(lengths, 1) for x in inputs))):
        part, final = scan(rows, state[n : n + 1])
        outputs += part
        states.append(final)
    return torch.stack(outputs, 1), torch.cat(states)
