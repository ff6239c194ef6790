"""Multi-head latent attention without position encoding, as in Kimi Linear (arXiv:2510.26692)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import check_count
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
from lkda.models.linear import fused_linear, is_plain
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
from lkda.models.sequence_part import states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolution, softmax_attention


class MultiHeadLatentAttention(Mixer):
    """Softmax attention whose keys and values are computed from one latent per token, which is all that is cached.

        c, r = split(kv_a x)        k = [k_nope(RMSNorm c), r], v = v(RMSNorm c)        scale = (nope + rope)^-0.5

    Args:
        kv_lora_rank: width of the latent c; half of d_model where None.
        qk_nope_head_dim: key channels per head from the latent; d_model / num_heads where None.
        qk_rope_head_dim: key channels r that the heads share; half a head where None. (Elsewhere rotary positions are
            applied to them, hence the name; not here.)
        v_head_dim: value channels per head; d_model / num_heads where None.
        norm_eps: of the RMSNorm of the latent; 1e-6 as in transformers' Kimi Linear, whose other norms have 1e-5.
        qk_norm: whether each head of q and k has an RMSNorm; all heads share its weight.
        conv_width: of short convolutions with SiLU, of q and of the latent with its shared key channels (before the
            latent's norm); 0 for none (then no SiLU either). The cache then holds what was convolved.
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
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        norm_eps: float = 1e-6,
        qk_norm: bool = False,
        conv_width: int = 0,
        conv_std: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(d_model, num_heads)
        widths_given = {
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        for name, width in widths_given.items():
            if width is not None:
                check_count(f"mixer.mla.{name}", width, least=1)
        self.rank = kv_lora_rank or d_model // 2
        self.nope = qk_nope_head_dim or self.head_dim
        self.rope = qk_rope_head_dim or self.head_dim // 2
        self.v_dim = v_head_dim or self.head_dim
        self.backend = backend
        self.q_proj = linear(d_model, num_heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(d_model, self.rank + self.rope)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=norm_eps)
        self.kv_b_proj = linear(self.rank, num_heads * (self.nope + self.v_dim))
        self.o_proj = linear(num_heads * self.v_dim, d_model)
        norms = (nn.RMSNorm(self.nope + self.rope, eps=norm_eps) if qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        widths = (num_heads * (self.nope + self.rope), self.rank + self.rope)
        convolutions = (ShortConvolution(size, conv_width, std=conv_std) if conv_width else None for size in widths)
        self.q_conv1d, self.kv_conv1d = convolutions

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        q, latent, shared, convolved = self._inputs(x, cu_seqlens, None if state is None else state[3:])
        caches, lengths = [latent, shared], None
        length = new_length(x.shape[0], None, x.device) if state is None else state[2]
        if state is not None:
            caches, lengths = append_many(state[:2], caches, length)
        y = self._output(q, *self._keys_and_values(*caches), lengths, cu_seqlens)
        if cu_seqlens is not None:
            return y, ()
        return y, (*(caches if state is None or not is_preallocated(length) else state[:2]), length, *convolved)

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        if not is_preallocated(state[2]):
            return super().forward_packed(x, state, cu_seqlens=cu_seqlens)
        q, latent, shared, convolved = self._inputs(x, cu_seqlens, None)
        fill_packed(state[:2], (latent, shared), state[2], cu_seqlens.diff().tolist())
        return self._output(q, *self._keys_and_values(latent, shared), None, cu_seqlens), (*state[:3], *convolved)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, latent, shared, convolved = self._inputs(x.unsqueeze(1), None, state[3:])
        caches = append_one(state[:2], (latent, shared), state[2])
        o = self._attend_one(q[:, 0], *filled(caches, state[2]))
        return self.o_proj(o.flatten(1)), (*caches, state[2], *convolved)

    def _inputs(
        self, x: Tensor, cu_seqlens: Tensor | None, before: State | None
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """q [B, T, H, nope + rope], the latent [B, T, rank], the shared key channels [B, T, rope], and the caches of
        the convolutions after them."""
        q, kv = fused_linear(x, [self.q_proj, self.kv_a_proj_with_mqa])
        convolved: State = ()
        if self.q_conv1d is not None and self.kv_conv1d is not None:
            q_cache, kv_cache = before or (None, None)
            if self.part is not None:
                (q_cache,) = states_before(q, [self.q_conv1d.weight], self.part)
                (kv_cache,) = states_before(kv, [self.kv_conv1d.weight], self.part)
            q, q_cache = short_convolution(q, self.q_conv1d.weight, state=q_cache, cu_seqlens=cu_seqlens)
            kv, kv_cache = short_convolution(kv, self.kv_conv1d.weight, state=kv_cache, cu_seqlens=cu_seqlens)
            convolved = (q_cache, kv_cache)
        q = self.heads(q)
        if self.q_norm is not None:
            q = self.q_norm(q).to(kv.dtype)
        latent, shared = kv.split([self.rank, self.rope], -1)
        return q, self.kv_a_layernorm(latent), shared, convolved

    def _keys_and_values(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """k [B, S, H, nope + rope] and v [B, S, H, v_dim]."""
        k, v = self.heads(self.kv_b_proj(latent)).split([self.nope, self.v_dim], -1)
        shared_heads = shared.unsqueeze(2).expand(-1, -1, self.num_heads, -1).to(k.dtype)
        k = torch.cat([k, shared_heads], -1)
        return k if self.k_norm is None else self.k_norm(k).to(v.dtype), v

    def _output(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if self.part is not None:
            o = self.part.attend(q, k, v, backend=self.backend)
        elif lengths is not None:
            o = attend_each(q, k, v, lengths, backend=self.backend)
        else:
            longest = self.longest_sequence
            o = softmax_attention(q, k, v, cu_seqlens=cu_seqlens, longest=longest, backend=self.backend)
        return self.o_proj(o.flatten(-2))

    def _attend_one(self, q: Tensor, caches: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """q [B, H, nope + rope], the latents [B, S, rank] and the shared key channels [B, S, rope] -> [B, H, v_dim].

        Without a norm of the keys, the query is projected to the latent and the sum of latents to the values (as in
        arXiv:2405.04434, section 2.1.2), which costs nothing per cached token. With it the keys are computed again, as
        they are where another module has taken the place of kv_b_proj.
        """
        latent, shared = (cache.to(q.dtype) for cache in caches)
        scale = q.shape[-1] ** -0.5
        if self.k_norm is not None or not is_plain(self.kv_b_proj):
            k, v = (y.transpose(1, 2) for y in self._keys_and_values(latent, shared))
            weights = masked_softmax(torch.matmul(k, q.unsqueeze(-1)).squeeze(-1), mask, scale)
            return torch.matmul(weights.unsqueeze(2), v).squeeze(2)
        to_key, to_value = self.kv_b_proj.weight.view(self.num_heads, -1, self.rank).split([self.nope, self.v_dim], 1)
        nope, rope = q.split([self.nope, self.rope], -1)
        nope = torch.einsum("bhn,hnr->bhr", nope, to_key)
        scores = torch.matmul(nope, latent.mT) + torch.matmul(rope, shared.mT)
        summed = torch.matmul(masked_softmax(scores, mask, scale), latent)
        return torch.einsum("bhr,hvr->bhv", summed, to_value)

    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        w = self.o_proj.weight
        device = device or w.device
        latent, shared = (new_cache(batch_size, max_tokens, (width,), w, device) for width in (self.rank, self.rope))
        convolutions = (conv for conv in (self.q_conv1d, self.kv_conv1d) if conv is not None)
        caches = (conv.init_state(batch_size, device=device) for conv in convolutions)
        return latent, shared, new_length(batch_size, max_tokens, device), *caches

    def cut_state(self, state: State, tokens: int) -> State:
        return cut(state[0], tokens), cut(state[1], tokens), *state[2:]

    def _filters(self) -> list[Tensor]:
        return [convolve.weight for convolve in (self.q_conv1d, self.kv_conv1d) if convolve is not None]

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self._filters())
        return (context * (self.rank + self.rope) + cached) * self.o_proj.weight.element_size()

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        convolved = sum(2.0 * weight.numel() for weight in self._filters())
        return linear_flops(self) + convolved + (context + 1) * self.num_heads * (self.nope + self.rope + self.v_dim)
