"""The layer of simplified linear attention: a state of two numbers per channel, and a decay per head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.mixer import State
from lkda.models.recurrent_mixer import RecurrentMixer, linear
from lkda.models.sequence_part import SequencePart
from lkda.ops import simplified_attention, simplified_decay, simplified_step_fused
from lkda.ops.precision import at_least_float32


class SimplifiedAttention(RecurrentMixer):
    """A decayed average of v, weighted by sigmoid(k) and gated by q, for each channel by itself.

    The decay b = sigmoid(W_b x + bias) is one number per head and token. The biases give the heads time constants from
    4 to 4096 tokens. Convolutions, head norm and output gate are those of KDA, so that only the operator differs.

    Args:
        conv_width: of the short convolutions; 0 for none.
        conv_std: standard deviation of their initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
        activation: of q, k and v: "silu", or "none", which is possible only without convolutions.
        decay: "token" (b depends on the token) or "constant" (one learned number per head).
        output_norm: whether the output of each head has an RMSNorm.
        output_gate: whether the normalised output is gated; needs output_norm.
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
        """Initialises all weights again."""
        super().reset_parameters()
        self._reset_decay()

    @torch.no_grad()
    def _reset_decay(self) -> None:
        """Initialises time constants from 4 to 4096 tokens: b = 1 - 1/memory, so its logit is log(memory - 1)."""
        memory = torch.logspace(math.log10(4), math.log10(4096), self.num_heads, device=self.decay_bias.device)
        self.decay_bias.copy_(torch.log(memory - 1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, ...],
        *,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        decay = self.decay(*gates)
        return simplified_attention(q, k, v, decay, initial_state=state, cu_seqlens=cu_seqlens, backend=self.backend)

    def attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], part: SequencePart
    ) -> tuple[Tensor, Tensor]:
        """A first pass without an entering state gives Z; A is the product of the decays. A second pass gives o."""
        _, Z = self.attend(q, k, v, gates, state=None, cu_seqlens=part.cu_seqlens)
        decay = part.by_row(self.decay(*gates).expand(*q.shape[:3]))
        length = decay.shape[1]
        A = torch.where(part.is_whole(length=length).unsqueeze(1), _product(decay), 0.0).to(Z.dtype)
        S = part.entering(A[..., None, None], part.last_of(Z, length=length), matrix=False)
        entering = part.initial_states(S, length=length)
        return self.attend(q, k, v, gates, state=entering, cu_seqlens=part.cu_seqlens)

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], *, state: State
    ) -> tuple[Tensor, State]:
        caches, (own,) = self._split_state(state)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        logits = gates[0] if gates else None
        o = simplified_step_fused(*(q, k, v, logits, self.decay_bias, own), weights=self._filters(), caches=caches)
        return o, state

    def gate_layers(self) -> list[nn.Linear]:
        return [] if self.b_proj is None else [self.b_proj]

    def decay(self, logits: Tensor | None = None) -> Tensor:
        """b of the shape of `logits` [..., H], or [H] where it is constant, in at least float32."""
        if logits is None:
            return torch.sigmoid(at_least_float32(self.decay_bias))
        return simplified_decay(logits, self.decay_bias)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.num_heads, 2, self.head_dim)

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the linear layers, the convolutions, and ten operations per channel."""
        return self.projection_flops() + 10 * self.num_heads * self.head_dim


def _product(x: Tensor) -> Tensor:
    """The product over dim 1, whose backward, unlike that of `Tensor.prod`, does not wait for the device."""
    while (length := x.shape[1]) > 1:
        half = length // 2
        pairs = x[:, :half] * x[:, half : 2 * half]
        x = pairs if length % 2 == 0 else torch.cat([pairs, x[:, -1:]], 1)
    return x[:, 0]
