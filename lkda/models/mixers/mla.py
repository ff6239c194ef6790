"""Multi-head latent attention (arXiv:2405.04434); also without positions, as in Kimi Linear (arXiv:2510.26692)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import InputError, check_count
from lkda.models.cached_attention import LEAVE_OUT_POSITIONS, CachedAttention, check_rope_base, refuse_full
from lkda.models.growing_cache import append_one, filled, masked_softmax, softmax_of_filled
from lkda.models.linear import fused_linear, is_plain
from lkda.models.mixer import State
from lkda.models.projected_mixer import ProjectedMixer
from lkda.models.recurrent_mixer import linear
from lkda.models.residual import are_ordinary, normed_residual
from lkda.models.rows import is_plain_norm, is_rms_norm
from lkda.models.sequence_part import states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import latent_keys, rotary_heads, short_convolution
from lkda.ops.softmax.cpu.step import advance_, can_take, latent_step_cpu
from lkda.ops.softmax.rotary import rotate


class MultiHeadLatentAttention(ProjectedMixer, CachedAttention):
    """Softmax attention whose keys and values are computed from one latent per token, which is all that is cached.

        c, r = split(kv_a x)        k = [k_nope(RMSNorm c), r], v = v(RMSNorm c)        scale = (nope + rope)^-0.5

    With rotary positions, r and the last `qk_rope_head_dim` channels of each head of q are rotated. The cache then
    holds the rotated r. With `qk_norm` it also holds 1 / |k| of each head.

    Args:
        kv_lora_rank: width of the latent c; half of d_model where None.
        qk_nope_head_dim: key channels per head from the latent; d_model / num_heads where None.
        qk_rope_head_dim: key channels r that the heads share; half a head where None.
        v_head_dim: value channels per head; d_model / num_heads where None.
        rope_base: of the rotary frequencies; None for no position encoding, as in Kimi Linear.
        norm_eps: of the RMSNorm of the latent; 1e-6 as in transformers' Kimi Linear, whose other norms have 1e-5.
        qk_norm: whether each head of q and k has an RMSNorm. All heads share its weight. With rotary positions the
            norm of q comes before the rotation, and that of k has no weight; so it may come after the rotation, which
            keeps its length.
        conv_width: of short convolutions with SiLU, of q and of the latent with its shared key channels (before the
            latent's norm and the rotation); 0 for none (then no SiLU either). The cache then holds what was convolved.
        conv_std: standard deviation of their initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
        backend: of `softmax_attention`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        rope_base: float | None = None,
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
        self.rope_base, self.norm_eps, self.backend = rope_base, norm_eps, backend
        check_rope_base("mla", rope_base)
        if rope_base is not None and self.rope % 2:
            raise InputError(
                f"rotary positions turn pairs of channels: mixer.mla.qk_rope_head_dim must be even, got {self.rope}: "
                f"choose an even number, {LEAVE_OUT_POSITIONS}."
            )
        self.q_proj = linear(d_model, num_heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = linear(d_model, self.rank + self.rope)
        self.kv_a_layernorm = nn.RMSNorm(self.rank, eps=norm_eps)
        self.kv_b_proj = linear(self.rank, num_heads * (self.nope + self.v_dim))
        self.o_proj = linear(num_heads * self.v_dim, d_model)
        self.o_norm = None
        width, weighted = self.nope + self.rope, rope_base is None
        self.q_norm = nn.RMSNorm(width, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(width, eps=norm_eps, elementwise_affine=weighted) if qk_norm else None
        widths = (num_heads * (self.nope + self.rope), self.rank + self.rope)
        convolutions = (ShortConvolution(size, conv_width, std=conv_std) if conv_width else None for size in widths)
        self.q_conv1d, self.kv_conv1d = convolutions

    def inputs(
        self, x: Tensor, *, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        q, kv = fused_linear(x, self.step_layers())
        return self._heads(q, kv, cu_seqlens, state)

    def _heads(
        self, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Sequence[Tensor]]:
        """`inputs`, from the outputs [B, T, ...] of both linear layers on."""
        convolved: State = ()
        if self.q_conv1d is not None and self.kv_conv1d is not None:
            q_cache, kv_cache = (None, None) if state is None else self.split_state(state)[2]
            if self.part is not None:
                (q_cache,) = states_before(q, [self.q_conv1d.weight], self.part)
                (kv_cache,) = states_before(kv, [self.kv_conv1d.weight], self.part)
            q, q_cache = short_convolution(q, self.q_conv1d.weight, state=q_cache, cu_seqlens=cu_seqlens)
            kv, kv_cache = short_convolution(kv, self.kv_conv1d.weight, state=kv_cache, cu_seqlens=cu_seqlens)
            convolved = (q_cache, kv_cache)
        q = self.heads(q)
        if self.q_norm is not None:
            q = self._normed(q, self.q_norm).to(kv.dtype)
        latent, shared = kv.split([self.rank, self.rope], -1)
        if self.rope_base is not None:
            q, shared = self._rotated(q, shared, self.token_positions(kv, cu_seqlens, state), self.rope_base)
        return q, (self._normed(latent, self.kv_a_layernorm), shared), convolved

    def _rotated(self, q: Tensor, shared: Tensor, position: Tensor, base: float) -> tuple[Tensor, Tensor]:
        """q [B, T, H, ... + rope] and shared [B, T, rope], with the last `rope` channels rotated: on a GPU in one
        launch."""
        nope, rope = q.split([q.shape[-1] - self.rope, self.rope], -1)
        keys = shared.unsqueeze(2)
        if q.is_cuda and are_ordinary(q, shared):
            rope, keys = rotary_heads(rope, keys, position, base=base)
        else:
            rope, keys = rotate(rope, position, base), rotate(keys, position, base)
        return torch.cat([nope, rope], -1), keys.squeeze(2)

    def step_layers(self) -> list[nn.Linear]:
        return [self.q_proj, self.kv_a_proj_with_mqa]

    def step_from(
        self, projected: Sequence[Tensor], factors: Sequence[Tensor], state: State
    ) -> tuple[Tensor, Tensor | None, State]:
        q, kv = projected
        self.check_state(state, len(q))
        if self._steps_in_cpp(q, kv, state):
            return self._attend_in_cpp(q, kv, state), None, state
        q, entries, convolved = self._heads(q.unsqueeze(1), kv.unsqueeze(1), None, state)
        before, length, _ = self.split_state(state)
        caches = append_one(before, self.stored(*entries), length)
        o = self._attend_one(q[:, 0], *filled(caches, length))
        return o, None, (*caches, length, *convolved)

    def _steps_in_cpp(self, q: Tensor, kv: Tensor, state: State) -> bool:
        plain = self.q_norm is None and is_plain(self.kv_b_proj) and is_plain_norm(self.kv_a_layernorm)
        fits = plain and all(self.state_fits_cpp(y, state) for y in (q, kv))
        return fits and can_take(q, self.kv_b_proj.weight, self.kv_a_layernorm.weight)

    def _attend_in_cpp(self, q: Tensor, kv: Tensor, state: State) -> Tensor:
        """The step from q and kv as projected to o [B, H, v_dim]. The state is changed in place."""
        latents, shareds, length, *caches = state
        refuse_full(latents, length)
        if caches:
            pairs = zip(self.convolutions(), (q, kv), caches, strict=True)
            q, kv = (convolve.step(y, cache)[0] for convolve, y, cache in pairs)
        latent, shared = kv.split([self.rank, self.rope], -1)
        o = latent_step_cpu(
            *(self.heads(q), latent, shared),
            norm=self.kv_a_layernorm.weight,
            eps=self.norm_eps,
            projection=self.kv_b_proj.weight,
            rope_base=self.rope_base,
            latents=latents,
            shareds=shareds,
            lengths=length[:, 0],
        )
        advance_(length)
        return o

    def keys_and_values(self, *caches: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._keys_and_values(*caches[:2])
        return self._normed_keys(k, v), v

    def _keys_and_values(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """As `keys_and_values`, without the norm of k."""
        k, v = self.heads(self.kv_b_proj(latent)).split([self.nope, self.v_dim], -1)
        return latent_keys(k, shared.to(k.dtype)), v

    def _normed_keys(self, k: Tensor, v: Tensor) -> Tensor:
        return k if self.k_norm is None else self._normed(k, self.k_norm).to(v.dtype)

    def stored(self, *entries: Tensor) -> Sequence[Tensor]:
        """With a norm of the keys, also 1 / |k| [B, T, H], with |k|^2 = sum of k_i^2 + K eps over the K channels.

        It is 1 / rms of a key, divided by sqrt(K). So the product of q and k, times it, is a score with its scale.
        """
        if self.k_norm is None:
            return entries
        return *entries, self._inverse(self._keys_and_values(*entries)[0])

    def attended_and_stored(self, *entries: Tensor) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:
        """In training and in a prefill, the projection of the latent is computed once for both."""
        k, v = self._keys_and_values(*entries)
        stored = entries if self.k_norm is None else (*entries, self._inverse(k))
        return (self._normed_keys(k, v), v), stored

    def _inverse(self, k: Tensor) -> Tensor:
        """1 / |k| of keys [..., K] without their norm."""
        wide = torch.promote_types(k.dtype, torch.float32)
        squares = torch.linalg.vector_norm(k, dim=-1, dtype=wide).square()
        return (squares + k.shape[-1] * self.norm_eps).rsqrt()

    @staticmethod
    def _normed(x: Tensor, norm: nn.Module) -> Tensor:
        return normed_residual(x, None, norm)[1]

    def _attend_one(self, q: Tensor, caches: Sequence[Tensor], empty: Tensor | None) -> Tensor:
        """q [B, H, nope + rope], the latents [B, S, rank], the shared key channels [B, S, rope], and with a norm of the
        keys 1 / |k| [B, S, H] -> [B, H, v_dim].

        The query is projected to the latent and the sum of latents to the values (as in arXiv:2405.04434, section
        2.1.2), which costs nothing per cached token. The keys are computed again where another module has taken the
        place of kv_b_proj or of their norm.
        """
        latent, shared, *inverse = caches
        latent, shared = latent.to(q.dtype), shared.to(q.dtype)
        scale = q.shape[-1] ** -0.5
        if not is_plain(self.kv_b_proj) or not (self.k_norm is None or is_rms_norm(self.k_norm)):
            k, v = (y.transpose(1, 2) for y in self.keys_and_values(latent, shared))
            weights = masked_softmax(torch.matmul(k, q.unsqueeze(-1)).squeeze(-1), empty, scale=scale)
            return torch.matmul(weights.unsqueeze(2), v).squeeze(2)
        to_key, to_value = self._weights_of_heads()
        if self.k_norm is not None and self.k_norm.weight is not None:
            q = (q * self.k_norm.weight).to(q.dtype)
        nope, rope = q.split([self.nope, self.rope], -1)
        nope = torch.bmm(nope.transpose(0, 1), to_key).transpose(0, 1)  # [B, H, rank]
        summed = self._sum_of_latents(nope, rope, latent, shared, empty, *inverse)
        return torch.bmm(summed.transpose(0, 1), to_value.mT).transpose(0, 1)

    def _weights_of_heads(self) -> tuple[Tensor, Tensor]:
        """The weights from the latent to the keys [H, nope, rank] and to the values [H, v_dim, rank] of each head."""
        to_key, to_value = self.kv_b_proj.weight.view(self.num_heads, -1, self.rank).split([self.nope, self.v_dim], 1)
        return to_key, to_value

    def _sum_of_latents(
        self,
        query: Tensor,
        rope: Tensor,
        latent: Tensor,
        shared: Tensor,
        empty: Tensor | None,
        inverse: Tensor | None = None,
    ) -> Tensor:
        """Attention in the latent space: query [B, H, rank], rope [B, H, rope] and the caches -> [B, H, rank].

        On a GPU with few sequences the time is that of the launches. So the second product adds and scales, too.
        """
        scale = (self.nope + self.rope) ** -0.5 if inverse is None else 1.0
        scores = torch.bmm(rope, shared.mT).baddbmm_(query, latent.mT, beta=scale, alpha=scale)
        if inverse is not None:
            # In float32 at least: rounded once more, scores would have a larger error than with computed keys.
            scores = scores * inverse.mT
        return torch.bmm(softmax_of_filled(scores, empty).to(latent.dtype), latent)

    @torch.no_grad()
    def absorbed(self, *, most_bytes: int) -> tuple[list[Tensor], Tensor] | None:
        """q_proj times the projection of q to the latent, [H * (rank + rope), d_model], the layer of the latent, and
        o_proj times the projection of latents to the values, [d_model, H * rank]."""
        layers = (self.q_proj, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj)
        if self.q_norm is not None or self.q_conv1d is not None or not all(map(is_plain, layers)):
            return None
        q, o = self.q_proj.weight, self.o_proj.weight
        numbers = self.num_heads * (2 * self.rank - self.nope - self.v_dim) * len(o) - self.kv_b_proj.weight.numel()
        if numbers * o.element_size() > most_bytes:
            return None
        to_key, to_value = (weight.double() for weight in self._weights_of_heads())
        nope, rope = self.heads(q.double().T).split([self.nope, self.rope], -1)  # [d_model, H, ...]
        query = torch.cat([torch.einsum("dhn,hnr->hrd", nope, to_key), rope.permute(1, 2, 0)], 1)
        values = torch.einsum("dhv,hvr->dhr", self.heads(o.double()), to_value)
        return [query.flatten(0, 1).to(q.dtype), self.kv_a_proj_with_mqa.weight], values.flatten(1).to(o.dtype)

    def absorbed_step_from(self, projected: Sequence[Tensor], state: State) -> tuple[Tensor, State]:
        query, kv = projected
        self.check_state(state, len(query))
        q, entries, _ = self._heads(query.unsqueeze(1), kv.unsqueeze(1), None, state)
        caches = append_one(state[:2], entries, state[2])
        to_attend, empty = filled(caches, state[2])
        latent, shared = (cache.to(q.dtype) for cache in to_attend)
        query, rope = q[:, 0].split([self.rank, self.rope], -1)
        return self._sum_of_latents(query, rope, latent, shared, empty).flatten(1), (*caches, state[2])

    def convolutions(self) -> list[ShortConvolution]:
        return [convolve for convolve in (self.q_conv1d, self.kv_conv1d) if convolve is not None]

    def entry_shapes(self) -> Sequence[tuple[int, ...]]:
        return [(self.rank,), (self.rope,), *([] if self.k_norm is None else [(self.num_heads,)])]

    def entry_dtypes(self) -> Sequence[torch.dtype]:
        own = self.o_proj.weight.dtype
        return [own, own, *([] if self.k_norm is None else [torch.promote_types(own, torch.float32)])]

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        return self.projection_flops() + (context + 1) * self.num_heads * (self.nope + self.rope + self.v_dim)
