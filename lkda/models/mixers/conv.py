"""A gated short convolution, which sees only a few tokens (BaseConv of arXiv:2312.04927)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.models.linear import FusedLinear, fused_linear, is_plain
from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
from lkda.models.sequence_part import states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolution


class GatedConvolution(Mixer):
    """y = o_proj(SiLU(conv(v_proj x)) * gate_proj x); the state is the cache of the convolution. It has no heads.

    As the first layer it lets any second layer compare each token with its neighbour, so that compared models differ
    only in their second layer.

    Args:
        conv_width: number of tokens that it sees, including the current one.
        conv_std: standard deviation of its initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
    """

    def __init__(self, d_model: int, num_heads: int, *, conv_width: int = 4, conv_std: float | None = None) -> None:
        super().__init__(d_model, num_heads)
        self.v_proj, self.gate_proj, self.o_proj = (linear(d_model, d_model) for _ in range(3))
        self.v_conv1d = ShortConvolution(d_model, conv_width, std=conv_std)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        cache = None if state is None else state[0]
        v, gate = fused_linear(x, [self.v_proj, self.gate_proj])
        if self.part is not None:
            (cache,) = states_before(v, [self.v_conv1d.weight], self.part)
        y, after = short_convolution(v, self.v_conv1d.weight, state=cache, cu_seqlens=cu_seqlens)
        return self.o_proj(y * gate), () if cu_seqlens is not None else (after,)

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        v, gate = fused_linear(x, [self.v_proj, self.gate_proj])
        y, after = short_convolution(v, self.v_conv1d.weight, cu_seqlens=cu_seqlens)
        return self.o_proj(y * gate), (after,)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        v, gate = fused_linear(x, [self.v_proj, self.gate_proj])
        y, cache = self.v_conv1d.step(v, state[0])
        if isinstance(self.o_proj, FusedLinear) and is_plain(self.o_proj):
            return self.o_proj.of_product(y, gate), (cache,)
        return self.o_proj(y * gate), (cache,)

    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        return (self.v_conv1d.init_state(batch_size, device=device),)

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the linear layers, the convolution and the product."""
        return linear_flops(self) + 2.0 * self.v_conv1d.weight.numel() + 2.0 * self.v_conv1d.weight.shape[0]
