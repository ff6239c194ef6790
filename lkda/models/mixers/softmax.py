"""Softmax attention with rotary positions, the mixer of the Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.cached_attention import CachedAttention
from lkda.models.growing_cache import is_preallocated, masked_softmax
from lkda.models.linear import fused_linear, joined_linear
from lkda.models.mixer import State
from lkda.models.recurrent_mixer import linear
from lkda.models.rope import kept_frequencies, rotate
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolutions
from lkda.ops.sequences import positions
from lkda.ops.softmax.cpu.step import softmax_step_cpu


class SoftmaxAttention(CachedAttention):
    """y = o_proj(softmax(rotary(q) rotary(k)^T / sqrt(D)) v); the state is the growing cache of keys [B, H, S, D]
    and values, its length (see `lkda.models.growing_cache`), and the caches of the convolutions.

    Args:
        rope_base: of the rotary frequencies.
        qk_norm: whether each head of q and k has an RMSNorm before the rotation, as in Qwen3. All heads share a weight.
        norm_eps: of that norm.
        conv_width: of short convolutions with SiLU of q, k and v, as in KDA; 0 for none, and then no SiLU either.
        conv_std: standard deviation of their initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
        backend: of `softmax_attention`.
    """

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
        self.rope_base, self.norm_eps, self.backend = rope_base, norm_eps, backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(d_model, d_model) for _ in range(4))
        norms = (nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        convolutions = (ShortConvolution(d_model, conv_width, std=conv_std) if conv_width else None for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = convolutions

    def inputs(
        self, x: Tensor, *, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        layers, filters = [self.q_proj, self.k_proj, self.v_proj], self.filters()
        convolved: Sequence[Tensor] = ()
        if filters:
            before = None if state is None else state[3:]
            streams, convolved = short_convolutions(
                joined_linear(x, layers), filters, states=before, cu_seqlens=cu_seqlens
            )
        else:
            streams = fused_linear(x, layers)
        q, k, v = (self.heads(y) for y in streams)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        position = self._positions(x, cu_seqlens, state)
        q, k = rotate(q, position, self.rope_base), rotate(k, position, self.rope_base)
        return q, (k.transpose(1, 2), v.transpose(1, 2)), convolved

    def _positions(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """The position of each token in its sequence, [T], or [B, T] where the lengths before them differ."""
        if cu_seqlens is not None:
            return positions(cu_seqlens, x.shape[1])[0]
        new = torch.arange(x.shape[1], device=x.device)
        if state is None:
            return new
        return new + (state[2] if is_preallocated(state[2]) else state[0].shape[2])

    def keys_and_values(self, *caches: Tensor) -> tuple[Tensor, Tensor]:
        k, v = caches
        return k.transpose(1, 2), v.transpose(1, 2)

    def attend_one(self, q: Tensor, caches: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        k, v = (cache.to(q.dtype) for cache in caches)
        weights = masked_softmax(torch.matmul(k, q.unsqueeze(-1)).squeeze(-1), mask, self.head_dim**-0.5)
        return torch.matmul(weights.unsqueeze(2), v).squeeze(2)

    def attend_one_cpu(self, x: Tensor, state: State) -> Tensor | None:
        keys, values, length, *caches = state
        streams = fused_linear(x, [self.q_proj, self.k_proj, self.v_proj])
        if caches:
            pairs = zip(self.convolutions(), streams, caches, strict=True)
            streams = tuple(convolve.step(y, cache)[0] for convolve, y, cache in pairs)
        return softmax_step_cpu(
            *(self.heads(y) for y in streams),
            frequencies=kept_frequencies(self.head_dim // 2, self.rope_base, x.device, x.dtype),
            keys=keys,
            values=values,
            length=length,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=self.norm_eps,
        )

    def convolutions(self) -> list[ShortConvolution]:
        return [convolve for convolve in (self.q_conv1d, self.k_conv1d, self.v_conv1d) if convolve is not None]

    def entry_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = (self.num_heads, self.head_dim)
        return shape, shape

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        return self.projection_flops() + 2 * (context + 1) * self.num_heads * self.head_dim
