"""The base of mixers with a constant state: short convolutions before the operator, a gated head norm after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.linear import Linear, fused_linear, joined_linear
from lkda.models.mixer import State, linear_flops, refuse_packed_state
from lkda.models.norm import GatedHeadNorm
from lkda.models.projected_mixer import ProjectedMixer
from lkda.models.sequence_part import SequencePart, states_before
from lkda.models.short_conv import ShortConvolution
from lkda.ops import l2_normalized, short_convolutions


class RecurrentMixer(ProjectedMixer):
    """q, k, v = SiLU(conv(W x)), then the operator, then y = o_proj(RMSNorm_head(o) * sigmoid(g_b(g_a(x)))).

    The state holds the caches of the convolutions, followed by the operator's own state as `keep` stores it.

    Args:
        conv_width: of the short convolutions; 0 for none.
        conv_std: standard deviation of their filters at the start, N(0, conv_std); None: uniform within
            1/sqrt(conv_width).
        activation: of q, k and v: "silu", or "none", which is possible only without convolutions.
        output_norm: whether the output of each head is normalised.
        output_gate: whether the normalised output is gated.

    Attributes:
        normalized: which of q, k and v are normalised to heads of unit L2 norm.
    """

    normalized: ClassVar[tuple[bool, bool, bool]] = (False, False, False)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        conv_width: int,
        conv_std: float | None,
        activation: str,
        output_norm: bool,
        output_gate: bool,
    ) -> None:
        super().__init__(d_model, num_heads)
        if activation not in ("silu", "none"):
            raise InputError(f"activation (of q, k and v) must be silu or none, got {activation!r}.")
        if activation == "none" and conv_width:
            raise InputError(f"activation=none needs conv_width=0, got {conv_width}: a short convolution has its SiLU.")
        self.activation = activation
        if output_gate and not output_norm:
            raise InputError("output_gate gates the normalised output: set output_norm=true too, or output_gate=false.")
        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, d_model) for _ in range(3))
        convolutions = (ShortConvolution(d_model, conv_width, std=conv_std) if conv_width else None for _ in range(3))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = convolutions
        self.g_a_proj = linear(d_model, self.head_dim) if output_gate else None
        self.g_b_proj = linear(self.head_dim, d_model) if output_gate else None
        self.o_norm = GatedHeadNorm(self.head_dim) if output_norm else None
        self.o_proj = linear(d_model, d_model)

    @abstractmethod
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
        """The operator on convolved q, k, v [B, T, H, D], of which those that `normalized` names are normalised.

        `gates` are the outputs [B, T, ...] of `gate_layers`. Returns: o [B, T, H, D] and the operator's state.
        """

    @abstractmethod
    def attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], part: SequencePart
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, if the sequences begin in the parts of other devices and go on there. The state that it returns
        is not that of the whole sequence."""

    @abstractmethod
    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], *, state: State
    ) -> tuple[Tensor, State]:
        """The convolutions, norms and operator on one token: q, k, v [B, H * D] as projected.

        `gates` [B, ...]: the outputs of the second factors without that of the output gate, then of the other gate
        layers. `state` is the whole state, with the caches first.

        Returns: o [B, H, D] and the whole state after the token.
        """

    @abstractmethod
    def gate_layers(self) -> list[nn.Linear]:
        """The linear layers of x whose outputs are the operator's gates."""

    def keep(self, own: Tensor) -> State:
        """The operator's state in the form that is stored from call to call."""
        return (own,)

    def widen(self, kept: State) -> Tensor:
        """The inverse of `keep`: the operator's state in the form that `attend` takes."""
        return kept[0]

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """The shape of the operator's own state, for one sequence."""

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        refuse_packed_state(cu_seqlens, state)
        y, own, after = self._mixed(x, cu_seqlens, state)
        return y, () if cu_seqlens is not None else (*after, *self.keep(own))

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        y, own, after = self._mixed(x, cu_seqlens, None)
        return y, (*after, *self.keep(own))

    def _mixed(
        self, x: Tensor, cu_seqlens: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The output [B, T, d_model], the operator's state, and the caches of the convolutions."""
        layers = [project for project, _ in self._paths()]
        projected = joined_linear(x, layers) if self._filters() else fused_linear(x, layers)
        latent, gates = self._gates(x)
        y, own, after = self._mix(projected, latent, gates, state=state, cu_seqlens=cu_seqlens)
        return self.o_proj(y.flatten(-2)), own, after

    def _mix(
        self,
        projected: Tensor | tuple[Tensor, ...],
        latent: Tensor | None,
        gates: tuple[Tensor, ...],
        *,
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """From the projections to the input of o_proj.

        Args:
            projected: q, k and v as projected, [B, T, 3 * H * D] for the convolutions or three tensors without them.
            latent, gates: as `_gates` returns them.
        Returns: y [B, T, H, D], the operator's state, and the caches of the convolutions.
        """
        caches, kept = (None, None) if state is None else self._split_state(state)
        if self.part is not None and (filters := self._filters()):
            assert isinstance(projected, Tensor)
            caches = tuple(states_before(projected, filters, self.part))
        inputs, after = self._inputs(projected, cu_seqlens, caches)
        q, k, v = (self.heads(y) for y in inputs)
        if self.part is not None:
            o, own = self.attend_in_parts(q, k, v, gates, self.part)
        else:
            before = None if kept is None else self.widen(kept)
            o, own = self.attend(q, k, v, gates, state=before, cu_seqlens=cu_seqlens)
        return self._normed(o, latent), own, after

    def _inputs(
        self, projected: Tensor | tuple[Tensor, ...], cu_seqlens: Tensor | None, caches: Sequence[Tensor] | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """q, k and v [B, T, H * D], convolved and normalised, and the caches after them."""
        if filters := self._filters():
            return short_convolutions(
                projected,
                filters,
                normalized=self.normalized,
                head_dim=self.head_dim,
                states=caches,
                cu_seqlens=cu_seqlens,
            )
        assert isinstance(projected, tuple)
        if self.activation == "silu":
            projected = tuple(F.silu(y) for y in projected)
        chosen = [i for i, word in enumerate(self.normalized) if word]
        if not chosen:
            return projected, ()
        norms = iter(l2_normalized(*(self.heads(projected[i]) for i in chosen)))
        return [next(norms).flatten(2) if i in chosen else y for i, y in enumerate(projected)], ()

    def factor_layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        return [] if self.g_a_proj is None or self.g_b_proj is None else [(self.g_a_proj, self.g_b_proj)]

    def step_layers(self) -> list[nn.Linear]:
        firsts = [first for first, _ in self.factor_layers()]
        gates = [layer for layer in self.gate_layers() if layer not in firsts]
        return [*(project for project, _ in self._paths()), *gates, *firsts]

    def step_from(
        self, projected: Sequence[Tensor], factors: Sequence[Tensor], state: State
    ) -> tuple[Tensor, Tensor | None, State]:
        q, k, v, *gates = projected
        if self.q_conv1d is None and self.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        *decay, gate = factors if self.g_b_proj is not None else (*factors, None)
        o, after = self.attend_step(q, k, v, (*decay, *gates), state=state)
        return o, gate, after

    def _gates(self, x: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The latent [..., D] of the output gate, None without one, and the operator's gates."""
        if self.g_a_proj is None:
            return None, fused_linear(x, self.gate_layers())
        latent, *gates = fused_linear(x, [self.g_a_proj, *self.gate_layers()])
        return latent, tuple(gates)

    def _split_state(self, state: State) -> tuple[State, State]:
        """Splits a state into the caches of the convolutions and the operator's own state."""
        count = sum(convolve is not None for _, convolve in self._paths())
        return state[:count], state[count:]

    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        w = self.o_proj.weight
        device, dtype = device or w.device, torch.promote_types(w.dtype, torch.float32)
        caches = (conv.init_state(batch_size, device=device) for _, conv in self._paths() if conv is not None)
        return (*caches, *self.keep(torch.zeros(batch_size, *self.state_shape, device=device, dtype=dtype)))

    def projection_flops(self) -> float:
        """FLOPs of one token in the linear layers and convolutions."""
        return linear_flops(self) + sum(2.0 * conv.weight.numel() for _, conv in self._paths() if conv is not None)

    def _normed(self, o: Tensor, latent: Tensor | None) -> Tensor:
        """o [..., H, D], normalised and gated."""
        if self.o_norm is None:
            return o
        gated = latent is not None and self.g_b_proj is not None
        y: Tensor = self.o_norm(o, self.heads(self.g_b_proj(latent)) if gated else None)  # type: ignore[misc]
        return y

    def _filters(self) -> list[Tensor]:
        return [convolve.weight for _, convolve in self._paths() if convolve is not None]

    def _paths(self) -> list[tuple[nn.Linear, ShortConvolution | None]]:
        return [(self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d)]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without a bias."""
    return Linear(inputs, outputs)
