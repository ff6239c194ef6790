"""Softmax attention with rotary positions, the mixer of the Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.cached_attention import CachedAttention, check_rope_base, refuse_full
from lkda.models.growing_cache import append_one, filled, is_preallocated, masked_softmax
from lkda.models.linear import fused_linear, joined_linear
from lkda.models.mixer import State
from lkda.models.projected_mixer import ProjectedMixer
from lkda.models.recurrent_mixer import linear
from lkda.models.residual import are_ordinary
from lkda.models.rows import is_plain_norm, normed
from lkda.models.sequence_part import states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import rotary_heads, short_convolutions, softmax_step
from lkda.ops.runtime.dispatch import wants_gradient
from lkda.ops.softmax.cpu.step import advance_
from lkda.ops.softmax.rotary import rotate
from lkda.ops.softmax.step import has_kernel


class SoftmaxAttention(ProjectedMixer, CachedAttention):
    """y = o_proj(softmax(rotary(q) rotary(k)^T / sqrt(D)) v); the state is the growing cache of keys [B, H, S, D]
    and values, its length (see `lkda.models.growing_cache`), and the caches of the convolutions.

    Args:
        rope_base: of the rotary frequencies; None for no position encoding, in hybrids whose other layers know the
            order.
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
        rope_base: float | None = 10000.0,
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
        check_rope_base("softmax", rope_base)
        self.rope_base, self.backend = rope_base, backend
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(d_model, d_model) for _ in range(4))
        self.o_norm = None
        norms = (nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        convolutions = (ShortConvolution(d_model, conv_width, std=conv_std) if conv_width else None for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = convolutions

    def step_layers(self) -> list[nn.Linear]:
        return [self.q_proj, self.k_proj, self.v_proj]

    def step_from(
        self, projected: Sequence[Tensor], factors: Sequence[Tensor], state: State
    ) -> tuple[Tensor, Tensor | None, State]:
        self.check_state(state, len(projected[0]))
        if all(self.state_fits_cpp(y, state) for y in projected):
            return self._attend_in_cpp(projected, state), None, state
        q, k, v, convolved = self._heads([y.unsqueeze(1) for y in projected], None, state)
        if self._steps_by_op(q, k, v, state):
            q, k = self._normed(q, k)
            k_cache, v_cache, length = state[:3]
            o = softmax_step(q[:, 0], k[:, 0], v[:, 0], k_cache, v_cache, length[:, 0], rope_base=self.rope_base)
            length.add_(1)
            return o, None, (*state[:3], *convolved)
        q, k = self._rotated(q, k, self.token_positions(q, None, state))
        caches = append_one(state[:2], (k.transpose(1, 2), v.transpose(1, 2)), state[2])
        o = self._attend_one(q[:, 0], *filled(caches, state[2]))
        return o, None, (*caches, state[2], *convolved)

    def _attend_in_cpp(self, projected: Sequence[Tensor], state: State) -> Tensor:
        """The step on a CPU, up to o [B, H, D]. The state is changed in place."""
        k_cache, v_cache, length, *caches = state
        refuse_full(k_cache, length)
        if caches:
            pairs = zip(self.convolutions(), projected, caches, strict=True)
            projected = [convolve.step(y, cache)[0] for convolve, y, cache in pairs]
        q, k, v = (self.heads(y) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = normed(q, self.q_norm), normed(k, self.k_norm)
        o = softmax_step(q, k, v, k_cache, v_cache, length[:, 0], rope_base=self.rope_base)
        advance_(length)
        return o

    def _steps_by_op(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> bool:
        """Whether a step is the operator `softmax_step`, which has no gradients."""
        return is_preallocated(state[2]) and has_kernel(q, state[0]) and not wants_gradient(q, k, v)

    def inputs(
        self, x: Tensor, *, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        layers = self.step_layers()
        projected = joined_linear(x, layers) if self.filters() else fused_linear(x, layers)
        q, k, v, convolved = self._heads(projected, cu_seqlens, state)
        q, k = self._rotated(q, k, self.token_positions(x, cu_seqlens, state))
        return q, (k.transpose(1, 2), v.transpose(1, 2)), convolved

    def keys_and_values(self, *caches: Tensor) -> tuple[Tensor, Tensor]:
        k, v = caches
        return k.transpose(1, 2), v.transpose(1, 2)

    def _heads(
        self, projected: Tensor | Sequence[Tensor], cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        """q, k and v [B, T, H, D], convolved, and the caches of the convolutions after them.

        Args:
            projected: q, k and v as projected, [B, T, 3 * H * D] for the convolutions, or three tensors.
        """
        convolved: Sequence[Tensor] = ()
        if filters := self.filters():
            before = None if state is None else state[3:]
            if self.part is not None:
                assert isinstance(projected, Tensor)
                before = tuple(states_before(projected, filters, self.part))
            projected, convolved = short_convolutions(projected, filters, states=before, cu_seqlens=cu_seqlens)
        q, k, v = (self.heads(y) for y in projected)
        return q, k, v, convolved

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The heads of q and k [B, T, H, D], normalised if the mixer has norms."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q).to(q.dtype), self.k_norm(k).to(k.dtype)

    def _rotated(self, q: Tensor, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The heads of q and k [B, T, H, D], normalised if the mixer has norms, and rotated: on a GPU in one launch."""
        if q.is_cuda and are_ordinary(q, k):
            if self.q_norm is None or self.k_norm is None:
                return rotary_heads(q, k, position, base=self.rope_base)
            plain = is_plain_norm(self.q_norm) and is_plain_norm(self.k_norm) and self.q_norm.eps == self.k_norm.eps
            weights = (self.q_norm.weight, self.k_norm.weight)
            if plain and are_ordinary(*weights):
                assert self.q_norm.eps is not None
                return rotary_heads(q, k, position, base=self.rope_base, weights=weights, eps=self.q_norm.eps)
        q, k = self._normed(q, k)
        return rotate(q, position, self.rope_base), rotate(k, position, self.rope_base)

    def _attend_one(self, q: Tensor, caches: Sequence[Tensor], empty: Tensor | None) -> Tensor:
        """q [B, H, D] and keys and values [B, H, S, D] -> [B, H, D]."""
        k, v = (cache.to(q.dtype) for cache in caches)
        weights = masked_softmax(torch.matmul(k, q.unsqueeze(-1)).squeeze(-1), empty, scale=self.head_dim**-0.5)
        return torch.matmul(weights.unsqueeze(2), v).squeeze(2)

    def convolutions(self) -> list[ShortConvolution]:
        return [convolve for convolve in (self.q_conv1d, self.k_conv1d, self.v_conv1d) if convolve is not None]

    def entry_shapes(self) -> Sequence[tuple[int, ...]]:
        shape = (self.num_heads, self.head_dim)
        return shape, shape

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        return self.projection_flops() + 2 * (context + 1) * self.num_heads * self.head_dim
