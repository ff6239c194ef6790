"""Softmax attention with rotary positions, the mixer of the Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.linear import fused_linear, joined_linear
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
from lkda.models.rope import rotate
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolutions, softmax_attention
from lkda.ops.sequences import positions


class SoftmaxAttention(Mixer):
    """y = o_proj(softmax(rotary(q) rotary(k)^T / sqrt(D)) v); the state is the growing cache of keys and values,
    followed by the caches of the convolutions.

    Args:
        rope_base: of the rotary frequencies.
        qk_norm: whether each head of q and k has an RMSNorm before the rotation, as in Qwen3. All heads share a weight.
        norm_eps: of that norm.
        conv_width: of short convolutions with SiLU of q, k and v, as in KDA; 0 for none, and then no SiLU either.
        conv_std: standard deviation of their initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
        backend: of `softmax_attention`.
    """

    op = "softmax"

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        conv_width: int = 0,
        conv_std: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(d_model, num_heads)
        if self.head_dim % 2:
            raise InputError(
                f"rotary positions turn pairs of channels: d_model / mixer.num_heads must be even, got {self.head_dim}."
            )
        self.rope_base, self.backend = rope_base, backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(d_model, d_model) for _ in range(4))
        norms = (nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        convolutions = (ShortConvolution(d_model, conv_width, std=conv_std) if conv_width else None for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = convolutions

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        layers, filters = [self.q_proj, self.k_proj, self.v_proj], self._filters()
        caches: tuple[Tensor, ...] = ()
        if filters:
            before = None if state is None else state[2:]
            inputs, caches = short_convolutions(joined_linear(x, layers), filters, states=before, cu_seqlens=cu_seqlens)
        else:
            inputs = fused_linear(x, layers)
        q, k, v = (self.heads(y) for y in inputs)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cu_seqlens is not None:
            position, _ = positions(cu_seqlens, x.shape[1])
        else:
            past = 0 if state is None else state[0].shape[1]
            position = torch.arange(past, past + x.shape[1], device=x.device)
        q, k = (rotate(y, position, self.rope_base) for y in (q, k))
        if state is not None:
            k, v = (torch.cat([past, new.to(past.dtype)], 1) for past, new in zip(state[:2], (k, v)))
        o = softmax_attention(
            *(q, k.to(q.dtype), v.to(q.dtype)),
            cu_seqlens=cu_seqlens,
            longest=self.longest_sequence,
            backend=self.backend,
        )
        return self.o_proj(o.flatten(-2)), () if cu_seqlens is not None else (k, v, *caches)

    def _filters(self) -> list[Tensor]:
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return [convolve.weight for convolve in convolutions if convolve is not None]

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x.unsqueeze(1), state=state)
        return y.squeeze(1), state

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> State:
        w = self.o_proj.weight
        empty = torch.empty(batch_size, 0, self.num_heads, self.head_dim, device=device or w.device, dtype=w.dtype)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        caches = (conv.init_state(batch_size, device=device) for conv in convolutions if conv is not None)
        return empty, empty, *caches

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self._filters())
        return (2 * context * self.num_heads * self.head_dim + cached) * self.o_proj.weight.element_size()

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        convolved = sum(2.0 * weight.numel() for weight in self._filters())
        return linear_flops(self) + convolved + 2 * (context + 1) * self.num_heads * self.head_dim
