"""Simplified linear attention, the layer: two numbers a channel, one learned decay a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.mixer import State
from lkda.models.recurrent_mixer import RecurrentMixer, linear
from lkda.ops import simplified_attention, simplified_step
from lkda.ops.precision import at_least_float32


class SimplifiedAttention(RecurrentMixer):
    """A decayed average of v weighted by sigmoid(k), channel by channel, gated by q.

    b = sigmoid(W_b x + bias), one a head and token; the biases so that heads remember from 4 to 4096 tokens. Around it
    the same convolutions, head norm and output gate as KDA has, so that the operator is the only difference.

    Args:
        conv_width: of the short convolutions; 0 for none.
        conv_std: standard deviation of their filters at the start, N(0, conv_std); None: uniform within
            1/sqrt(conv_width).
        activation: "silu", of q, k and v; "none" is possible without convolutions alone.
        decay: "token" (b from the token) or "constant" (one learned number a head).
        output_norm: RMSNorm over each head's output.
        output_gate: gate the normalised output; needs output_norm.
        backend: of `simplified_attention`.
    """

    op = "simplified"

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        conv_width: int = 4,
        conv_std: float | None = None,
        activation: str = "silu",
        decay: str = "token",
        output_norm: bool = True,
        output_gate: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            *(d_model, num_heads),
            conv_width=conv_width,
            conv_std=conv_std,
            activation=activation,
            output_norm=output_norm,
            output_gate=output_gate,
        )
        if decay not in ("token", "constant"):
            raise InputError(f"mixer.simplified.decay must be token or constant, got {decay!r}.")
        self.backend = backend
        self.b_proj = linear(d_model, num_heads) if decay == "token" else None
        self.decay_bias = nn.Parameter(torch.empty(num_heads))
        self._reset_decay()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        super().reset_parameters()
        self._reset_decay()

    @torch.no_grad()
    def _reset_decay(self) -> None:
        """Memories from 4 to 4096 tokens: b = 1 - 1/memory, so its logit is log(memory - 1)."""
        memory = torch.logspace(math.log10(4), math.log10(4096), self.num_heads, device=self.decay_bias.device)
        self.decay_bias.copy_(torch.log(memory - 1))

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay = self.decay(x)
        return simplified_attention(q, k, v, decay, initial_state=state, cu_seqlens=cu_seqlens, backend=self.backend)

    def attend_step(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, state: State) -> tuple[Tensor, State]:
        caches, (own,) = self._parts(state)
        (q, k, v), after = self._convolve_step(q, k, v, caches=caches)
        o, own = simplified_step(q, k, v, self.decay(x), own)
        return o, (*after, own)

    def decay(self, x: Tensor) -> Tensor:
        """b [..., H], or [H] where it is constant, in float32 at least."""
        bias = at_least_float32(self.decay_bias)
        return torch.sigmoid(bias if self.b_proj is None else at_least_float32(self.b_proj(x)) + bias)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.num_heads, 2, self.head_dim)

    def flops_per_token(self, context: int) -> float:
        """Linear layers, convolutions, and ten operations a channel."""
        return self.projection_flops() + 10 * self.num_heads * self.head_dim
