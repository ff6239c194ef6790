"""A gated short convolution: what happened within a few tokens, and nothing else (as BaseConv of arXiv:2312.04927)."""

from __future__ import annotations

import torch
from torch import Tensor

from lkda.models.mixer import Mixer, State, linear_flops, refuse_packed_state
from lkda.models.recurrent_mixer import linear
from lkda.models.short_conv import ShortConvolution
from lkda.ops import short_convolution


class GatedConvolution(Mixer):
    """y = o_proj(SiLU(conv(v_proj x)) * gate_proj x); the state is the convolution's cache. It has no heads.

    A first layer of it lets a second one, of any kind, compare each token with its neighbour's; so models differ in the
    second alone.

    Args:
        conv_width: tokens that it sees, its own included.
        conv_std: standard deviation of its filters at the start, N(0, conv_std); None: uniform within
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
        y, after = short_convolution(self.v_proj(x), self.v_conv1d.weight, state=cache, cu_seqlens=cu_seqlens)
        return self.o_proj(y * self.gate_proj(x)), () if cu_seqlens is not None else (after,)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, cache = self.v_conv1d.step(self.v_proj(x), state[0])
        return self.o_proj(y * self.gate_proj(x)), (cache,)

    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> State:
        return (self.v_conv1d.init_state(batch_size, device=device),)

    def flops_per_token(self, context: int) -> float:
        """Linear layers, the convolution and the product."""
        return linear_flops(self) + 2.0 * self.v_conv1d.weight.numel() + 2.0 * self.v_conv1d.weight.shape[0]
