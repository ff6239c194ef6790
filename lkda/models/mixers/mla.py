"""Multi-head latent attention without position encoding, as in Kimi Linear (arXiv:2510.26692)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lkda.checks import check_count
from lkda.models.linear import fused_linear
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
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
        q, kv = fused_linear(x, [self.q_proj, self.kv_a_proj_with_mqa])
        caches: tuple[Tensor, ...] = ()
        if self.q_conv1d is not None and self.kv_conv1d is not None:
            q_cache, kv_cache = (None, None) if state is None else state[2:]
            q, q_cache = short_convolution(q, self.q_conv1d.weight, state=q_cache, cu_seqlens=cu_seqlens)
            kv, kv_cache = short_convolution(kv, self.kv_conv1d.weight, state=kv_cache, cu_seqlens=cu_seqlens)
            caches = (q_cache, kv_cache)
        q = self.heads(q)
        latent, shared = kv.split([self.rank, self.rope], -1)
        latent = self.kv_a_layernorm(latent)
        if state is not None:
            latent, shared = (torch.cat([past, y.to(past.dtype)], 1) for past, y in zip(state[:2], (latent, shared)))
        k, v = self.heads(self.kv_b_proj(latent)).split([self.nope, self.v_dim], -1)
        shared_heads = shared.unsqueeze(2).expand(-1, -1, self.num_heads, -1).to(k.dtype)
        k = torch.cat([k, shared_heads], -1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        o = softmax_attention(*(q, k, v), cu_seqlens=cu_seqlens, longest=self.longest_sequence, backend=self.backend)
        return self.o_proj(o.flatten(-2)), () if cu_seqlens is not None else (latent, shared, *caches)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.forward(x.unsqueeze(1), state=state)
        return y.squeeze(1), state

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> State:
        w = self.o_proj.weight
        latent, shared = (
            torch.empty(batch_size, 0, width, device=device or w.device, dtype=w.dtype)
            for width in (self.rank, self.rope)
        )
        convolutions = (self.q_conv1d, self.kv_conv1d)
        return (
            latent,
            shared,
            *(conv.init_state(batch_size, device=device) for conv in convolutions if conv is not None),
        )

    def _filters(self) -> list[Tensor]:
        return [convolve.weight for convolve in (self.q_conv1d, self.kv_conv1d) if convolve is not None]

    def state_bytes(self, context: int) -> int:
        cached = sum(weight.numel() - len(weight) for weight in self._filters())
        return (context * (self.rank + self.rope) + cached) * self.o_proj.weight.element_size()

    def flops_per_token(self, context: int) -> float:
        """FLOPs of linear layers, convolutions, scores and sums; a token sees (context + 1) / 2 tokens on average."""
        convolved = sum(2.0 * weight.numel() for weight in self._filters())
        return linear_flops(self) + convolved + (context + 1) * self.num_heads * (self.nope + self.rope + self.v_dim)
