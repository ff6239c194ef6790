"""Softmax attention with rotary positions, the mixer of the Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.growing_cache import (
    append_many,
    append_one,
    attend_each,
    cut,
    fill_packed,
    filled,
    is_preallocated,
    masked_softmax,
    new_cache,
    new_length,
)
from lkda.models.linear import fused_linear, joined_linear
from lkda.models.mixer import State, linear_flops, refuse_packed_state
from lkda.models.projected_mixer import ProjectedMixer
from lkda.models.recurrent_mixer import linear
from lkda.models.sequence_part import states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolutions, softmax_attention, softmax_step
from lkda.ops.runtime.dispatch import wants_gradient
from lkda.ops.sequences import positions
from lkda.ops.softmax.rotary import rotate
from lkda.ops.softmax.step import has_kernel


class SoftmaxAttention(ProjectedMixer):
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
        self.o_norm = None
        norms = (nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        convolutions = (ShortConvolution(d_model, conv_width, std=conv_std) if conv_width else None for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = convolutions

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        q, k, v, convolved = self._rotated(x, cu_seqlens, state)
        caches, lengths = [k.transpose(1, 2), v.transpose(1, 2)], None
        length = new_length(x.shape[0], None, x.device) if state is None else state[2]
        if state is not None:
            caches, lengths = append_many(state[:2], caches, length)
            k, v = (cache.transpose(1, 2) for cache in caches)
        y = self._output(q, k, v, lengths, cu_seqlens)
        if cu_seqlens is not None:
            return y, ()
        return y, (*(caches if state is None or not is_preallocated(length) else state[:2]), length, *convolved)

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        if not is_preallocated(state[2]):
            return super().forward_packed(x, state, cu_seqlens=cu_seqlens)
        q, k, v, convolved = self._rotated(x, cu_seqlens, None)
        fill_packed(state[:2], (k.transpose(1, 2), v.transpose(1, 2)), state[2], cu_seqlens.diff().tolist())
        return self._output(q, k, v, None, cu_seqlens), (*state[:3], *convolved)

    def step_layers(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def step_from(
        self, projected: Sequence[Tensor], factors: Sequence[Tensor], state: State
    ) -> tuple[Tensor, Tensor | None, State]:
        q, k, v, convolved = self._heads([y.unsqueeze(1) for y in projected], None, state)
        if self._steps_by_op(q, k, v, state):
            k_cache, v_cache, length = state[:3]
            o = softmax_step(q[:, 0], k[:, 0], v[:, 0], k_cache, v_cache, length[:, 0], rope_base=self.rope_base)
            length.add_(1)
            return o, None, (*state[:3], *convolved)
        position = self._positions(q, None, state)
        q, k = rotate(q, position, self.rope_base), rotate(k, position, self.rope_base)
        caches = append_one(state[:2], (k.transpose(1, 2), v.transpose(1, 2)), state[2])
        o = self._attend_one(q[:, 0], *filled(caches, state[2]))
        return o, None, (*caches, state[2], *convolved)

    def _steps_by_op(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> bool:
        """Whether a step is the operator `softmax_step`, which has no gradients."""
        return is_preallocated(state[2]) and has_kernel(q, state[0]) and not wants_gradient(q, k, v)

    def _positions(self, x: Tensor, cu_seqlens: Tensor | None, state: State | None) -> Tensor:
        """The position of each token in its sequence, [T], or [B, T] where the lengths before them differ."""
        new = torch.arange(x.shape[1], device=x.device)
        if self.part is not None:
            return self.part.positions(new if cu_seqlens is None else positions(cu_seqlens, x.shape[1])[0])
        if cu_seqlens is not None:
            return positions(cu_seqlens, x.shape[1])[0]
        if state is None:
            return new
        return new + (state[2] if is_preallocated(state[2]) else state[0].shape[2])

    def _rotated(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        """`_heads` of x [B, T, d_model], with q and k rotated."""
        layers = self.step_layers()
        projected = joined_linear(x, layers) if self._filters() else fused_linear(x, layers)
        q, k, v, convolved = self._heads(projected, cu_seqlens, state)
        position = self._positions(x, cu_seqlens, state)
        return rotate(q, position, self.rope_base), rotate(k, position, self.rope_base), v, convolved

    def _heads(
        self, projected: Tensor | Sequence[Tensor], cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        """q, k and v [B, T, H, D], convolved and normalised, and the caches of the convolutions after them.

        Args:
            projected: q, k and v as projected, [B, T, 3 * H * D] for the convolutions, or three tensors.
        """
        convolved: Sequence[Tensor] = ()
        if filters := self._filters():
            before = None if state is None else state[3:]
            if self.part is not None:
                assert isinstance(projected, Tensor)
                before = tuple(states_before(projected, filters, self.part))
            projected, convolved = short_convolutions(projected, filters, states=before, cu_seqlens=cu_seqlens)
        q, k, v = (self.heads(y) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v, convolved

    def _output(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """y of q [B, T, H, D] and k and v [B, S, H, D]; `lengths` as `append_many` returns them."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.part is not None:
            o = self.part.attend(q, k, v, backend=self.backend)
        elif lengths is not None:
            o = attend_each(q, k, v, lengths, backend=self.backend)
        else:
            longest = self.longest_sequence
            o = softmax_attention(q, k, v, cu_seqlens=cu_seqlens, longest=longest, backend=self.backend)
        return self.o_proj(o.flatten(-2))

    def _attend_one(self, q: Tensor, caches: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """q [B, H, D] and keys and values [B, H, S, D] -> [B, H, D]."""
        k, v = (cache.to(q.dtype) for cache in caches)
        weights = masked_softmax(torch.matmul(k, q.unsqueeze(-1)).squeeze(-1), mask, self.head_dim**-0.5)
        return torch.matmul(weights.unsqueeze(2), v).squeeze(2)

    def _filters(self) -> list[Tensor]:
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return [convolve.weight for convolve in convolutions if convolve is not None]

    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        w = self.o_proj.weight
        device, shape = device or w.device, (self.num_heads, self.head_dim)
        k, v = (new_cache(batch_size, max_tokens, shape, w, device) for _ in range(2))
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        caches = (conv.init_state(batch_size, device=device) for conv in convolutions if conv is not None)
        return k, v, new_length(batch_size, max_tokens, device), *caches

    def cut_state(self, state: State, tokens: int) -> State:
        return cut(state[0], tokens), cut(state[1], tokens), *state[2:]

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self._filters())
        return (2 * context * self.num_heads * self.head_dim + cached) * self.o_proj.weight.element_size()

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        convolved = sum(2.0 * weight.numel() for weight in self._filters())
        return linear_flops(self) + convolved + 2 * (context + 1) * self.num_heads * self.head_dim
