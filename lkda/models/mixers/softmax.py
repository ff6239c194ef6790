"""Softmax attention with rotary positions: the Transformer's mixer."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
from lkda.models.rope import rotate
from lkda.ops import softmax_attention
from lkda.ops.sequences import positions


class SoftmaxAttention(Mixer):
    """y = o_proj(softmax(rotary(q) rotary(k)^T / sqrt(D)) v); the state is the growing cache of keys and values.

    Args:
        rope_base: of the rotary frequencies.
        backend: of `softmax_attention`.
    """

    op = "softmax"

    def __init__(self, d_model: int, num_heads: int, *, rope_base: float = 10000.0, backend: str = "auto") -> None:
        super().__init__(d_model, num_heads)
        if self.head_dim % 2:
            raise InputError(
                f"rotary positions turn pairs of channels: d_model / mixer.num_heads must be even, got {self.head_dim}."
            )
        self.rope_base, self.backend = rope_base, backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(d_model, d_model) for _ in range(4))

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if cu_seqlens is not None:
            position, _ = positions(cu_seqlens, x.shape[1])
        else:
            past = 0 if state is None else state[0].shape[1]
            position = torch.arange(past, past + x.shape[1], device=x.device)
        q, k = (rotate(y, position, self.rope_base) for y in (q, k))
        if state is not None:
            k, v = (torch.cat([past, new.to(past.dtype)], 1) for past, new in zip(state, (k, v)))
        o = softmax_attention(q, k.to(q.dtype), v.to(q.dtype), cu_seqlens=cu_seqlens, backend=self.backend)
        return self.o_proj(o.flatten(-2)), () if cu_seqlens is not None else (k, v)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x.unsqueeze(1), state=state)
        return y.squeeze(1), state

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> State:
        w = self.o_proj.weight
        empty = torch.empty(batch_size, 0, self.num_heads, self.head_dim, device=device or w.device, dtype=w.dtype)
        return empty, empty

    def state_bytes(self, context: int) -> int:
        return 2 * context * self.num_heads * self.head_dim * self.o_proj.weight.element_size()

    def flops_per_token(self, context: int) -> float:
        """Linear layers, and scores and sums over the (context + 1) / 2 tokens that a token sees on average."""
        return linear_flops(self) + 2 * (context + 1) * self.num_heads * self.head_dim
