"""The layer of Kimi Delta Attention (arXiv:2510.26692, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.init import inverse_softplus, log_uniform_
from lkda.models.linear import is_plain
from lkda.models.mixer import State
from lkda.models.recurrent_mixer import RecurrentMixer, linear
from lkda.models.sequence_part import SequencePart
from lkda.ops import KDAGate, kda_attention_fused, kda_step_fused
from lkda.ops.kda.cuda.layer import kda_layer_cuda
from lkda.ops.kda.cuda.layer import runs as kda_layer_runs
from lkda.ops.kda.reference.gate import FORMS, LOWEST_BOUND
from lkda.ops.kda.state import STATE_DTYPES, pack_state, unpack_state


class KimiDeltaAttention(RecurrentMixer):
    """Linear attention with a D x D state per head, a delta rule, and a decay per channel.

        q, k, v = SiLU(conv(W x)), q and k of unit norm           beta = sigmoid(W_beta x), one per head
        g = -exp(A_log) softplus(f_b(f_a(x)) + dt_bias)           (W_alpha, of low rank D)
        y = o_proj(RMSNorm_head(o) * sigmoid(g_b(g_a(x))))        o = kda_attention(q, k, v, g, beta)

    Args:
        conv_width: of the short convolutions; 0 for none.
        conv_std: standard deviation of their initial filters, N(0, conv_std); where None, they are uniform within
            1/sqrt(conv_width).
        activation: of q, k and v: "silu", or "none", which is possible only without convolutions.
        gate: "channel" (a decay per channel), "head" (one per head) or "none" (no decay: the delta rule).
        gate_form: "softplus", or "bounded": g = lower_bound * sigmoid(exp(A_log) * (f_b(f_a(x)) + dt_bias)).
        lower_bound: of g in the bounded form, in [-5, 0).
        negative_eigenvalues: beta in [0, 2] instead of [0, 1].
        output_gate: whether o is gated.
        state_dtype: dtype in which the state is stored between calls: float32 (float64 in a float64 model), bfloat16,
            or int8 with a scale per row; docs/guides/generating.md says when each is safe. Training on whole sequences
            does not depend on it.
        backend: of `kda_attention`.

    Attributes:
        save_for_backward: what a training step on a GPU saves between forward and backward, one of
            `lkda.ops.kda.cuda.layer.SAVED_FOR_BACKWARD`. None runs the operators one by one: each saves its inputs, and
            the core its workspaces too. The default is None, and "workspaces" for heads of 128.
    """

    op = "kda"
    normalized = (True, True, False)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        conv_width: int = 4,
        conv_std: float | None = None,
        activation: str = "silu",
        gate: str = "channel",
        gate_form: str = "softplus",
        lower_bound: float = -5.0,
        negative_eigenvalues: bool = False,
        output_gate: bool = True,
        state_dtype: str = "float32",
        backend: str = "auto",
    ) -> None:
        super().__init__(
            *(d_model, num_heads),
            conv_width=conv_width,
            conv_std=conv_std,
            activation=activation,
            output_norm=True,
            output_gate=output_gate,
        )
        gates = {"channel": d_model, "head": num_heads, "none": 0}
        if gate not in gates:
            raise InputError(f"mixer.kda.gate must be one of {', '.join(gates)}, got {gate!r}.")
        if gate_form not in FORMS:
            raise InputError(f"mixer.kda.gate_form must be softplus or bounded, got {gate_form!r}.")
        if not LOWEST_BOUND <= lower_bound < 0:
            raise InputError(f"mixer.kda.lower_bound must be in [-5, 0), got {lower_bound}.")
        if state_dtype not in STATE_DTYPES:
            raise InputError(f"mixer.kda.state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}.")
        self.save_for_backward = "workspaces" if self.head_dim >= 128 else None
        self.state_dtype = state_dtype
        self.gate, self.gate_form, self.lower_bound = gate, gate_form, lower_bound
        self.negative_eigenvalues, self.backend = negative_eigenvalues, backend
        if gate != "none":
            self.f_a_proj, self.f_b_proj = linear(d_model, self.head_dim), linear(self.head_dim, gates[gate])
            self.A_log = nn.Parameter(torch.empty(1, 1, num_heads, 1))
            self.dt_bias = nn.Parameter(torch.empty(gates[gate]))
            self._reset_gate()
        self.b_proj = linear(d_model, num_heads)

    def reset_parameters(self) -> None:
        """Initialises all weights again."""
        super().reset_parameters()
        if self.gate != "none":
            self._reset_gate()

    @torch.no_grad()
    def _reset_gate(self) -> None:
        """Initialises rates exp(A_log) from 1 to 16 and steps softplus(dt_bias) from 0.001 to 0.1, as in Mamba."""
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(inverse_softplus(log_uniform_(self.dt_bias, low=1e-3, high=1e-1)))

    def _mix(
        self,
        projected: Tensor | tuple[Tensor, ...],
        latent: Tensor | None,
        gates: tuple[Tensor, ...],
        *,
        state: State | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        if not self._recomputes(projected, state):
            return super()._mix(projected, latent, gates, state=state, cu_seqlens=cu_seqlens)
        assert isinstance(projected, Tensor)
        assert self.o_norm is not None
        assert self.save_for_backward is not None
        *decay, beta = gates
        return kda_layer_cuda(
            projected,
            self._filters(),
            decay[0] if decay else None,
            self.f_b_proj.weight if decay else None,
            beta,
            self._kda_gate(),
            latent,
            None if self.g_b_proj is None else self.g_b_proj.weight,
            self.o_norm.weight,
            head_dim=self.head_dim,
            cu_seqlens=cu_seqlens,
            save_for_backward=self.save_for_backward,
        )

    def _recomputes(self, projected: Tensor | tuple[Tensor, ...], state: State | None) -> bool:
        """Whether to run the layer as one function of its projections, whose backward recomputes the rest."""
        if self.save_for_backward is None or not self.recomputes or self.part is not None:
            return False
        if state is not None or not torch.is_grad_enabled():
            return False
        inner = (self.g_b_proj, None if self.gate == "none" else self.f_b_proj)
        if not isinstance(projected, Tensor) or not all(layer is None or is_plain(layer) for layer in inner):
            return False
        return kda_layer_runs(projected, self._filters(), self.head_dim, self.backend)

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
        return kda_attention_fused(
            *(q, k, v, *self._logits(*gates), self._kda_gate()),
            normalized=True,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    def attend_in_parts(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], part: SequencePart
    ) -> tuple[Tensor, Tensor]:
        """The operator is linear in (v, S) together. With S = 0 it gives this part's own output and Z. With v = 0 and
        S = I it gives A, and outputs from which those of any entering S follow by a product."""
        o, after = self.attend(q, k, v, gates, state=None, cu_seqlens=part.cu_seqlens)
        length = part.by_row(q).shape[1]
        one = torch.eye(self.head_dim, device=q.device, dtype=after.dtype)
        ones = part.initial_states(one.expand(part.rows, self.num_heads, -1, -1), length=length)
        from_one, through = self.attend(q, k, torch.zeros_like(v), gates, state=ones, cu_seqlens=part.cu_seqlens)
        A, Z = (part.last_of(states, length=length) for states in (through, after))
        S = part.entering(A, Z, matrix=True)
        entered = torch.einsum("rthk,rhkv->rthv", part.by_row(from_one).to(S.dtype), S)
        return (o + entered.reshape(o.shape)).to(o.dtype), after

    def attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], *, state: State
    ) -> tuple[Tensor, State]:
        caches, kept = self._split_state(state)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        *decay, beta = gates
        logits = None if not decay else self.heads(decay[0]) if self.gate == "channel" else decay[0]
        o = kda_step_fused(
            *(q, k, v, logits, beta, self._kda_gate(), kept),
            weights=[convolve.weight for _, convolve in self._paths() if convolve is not None],
            caches=caches,
        )
        return o, state

    def keep(self, own: Tensor) -> State:
        return pack_state(own, STATE_DTYPES[self.state_dtype])

    def widen(self, kept: State) -> Tensor:
        return unpack_state(kept)

    def gate_layers(self) -> list[nn.Linear]:
        return [self.b_proj] if self.gate == "none" else [self.f_a_proj, self.b_proj]

    def factor_layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        decay = [] if self.gate == "none" else [(self.f_a_proj, self.f_b_proj)]
        return decay + super().factor_layers()

    def _logits(self, *gates: Tensor) -> tuple[Tensor | None, Tensor]:
        """The logits of the decay, [..., H, D], [..., H] for one per head, or None without a gate; those of beta."""
        *latent, beta = gates
        if not latent:
            return None, beta
        logits = self.f_b_proj(*latent)
        return self.heads(logits) if self.gate == "channel" else logits, beta

    def _kda_gate(self) -> KDAGate:
        A_log, dt_bias = (None, None) if self.gate == "none" else (self.A_log, self.dt_bias)
        return KDAGate(A_log, dt_bias, self.gate_form, self.lower_bound, self.negative_eigenvalues)

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.num_heads, self.head_dim, self.head_dim)

    def flops_per_token(self, context: int) -> float:
        """FLOPs of the linear layers, convolutions and the recurrence: decay, read, write and query of the state."""
        return self.projection_flops() + 7 * self.num_heads * self.head_dim**2
