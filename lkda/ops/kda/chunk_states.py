"""KDA with the state before every chunk, for serving programs that keep states of prefixes."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.kda.op import backend_of, check_attention, kda_attention
from lkda.ops.recurrence import compute_dtype
from lkda.ops.sequences import lengths_of


@torch.no_grad()
def kda_chunk_states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalized: bool = True,
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`kda_attention` without gradients, and the states before every `chunk_size` tokens of each sequence.

    It calls `kda_attention` once per chunk, so it is slower than one call of it, and cu_seqlens is read on the host.

    Args:
        chunk_size: tokens between two states.
        The others are those of `kda_attention`.
    Returns: o and final_state as `kda_attention`, and the states [B, chunks, HV, K, V] in the dtype of final_state.
        With cu_seqlens B is 1, and the chunks of all sequences follow one another.
    Raises: ValueError as `kda_attention`.
    """
    fn = "kda_chunk_states"
    check_attention(fn, q, k, v, g, beta, initial_state, cu_seqlens)
    if chunk_size < 1:
        raise InputError(f"{fn}: chunk_size must be at least 1, got {chunk_size}.")
    word = backend_of(fn, backend, q)
    N = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        shape = (N, v.shape[2], q.shape[3], v.shape[3])
        initial_state = torch.zeros(shape, dtype=compute_dtype(v), device=v.device)
    inputs, outputs, states, finals = (q, k, v, g, beta), [], [], []
    lengths = [q.shape[1]] if cu_seqlens is None else lengths_of(1, q.shape[1], cu_seqlens)
    begins = initial_state.split(len(q) if cu_seqlens is None else 1)
    for sequence, state in zip(zip(*(x.split(lengths, 1) for x in inputs), strict=True), begins, strict=True):
        for chunk in zip(*(x.split(chunk_size, 1) for x in sequence), strict=True):
            if chunk[0].shape[1] == 0:
                continue
            states.append(state)
            o, state = kda_attention(*chunk, scale=scale, initial_state=state, normalized=normalized, backend=word)
            outputs.append(o)
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals), torch.stack(states, 1)
