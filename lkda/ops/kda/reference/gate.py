"""The gates of a KDA layer in PyTorch: the definition that the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_shape
from lkda.ops.precision import at_least_float32

FORMS = ("softplus", "bounded")
LOWEST_BOUND = -5.0


@dataclass(frozen=True)
class KDAGate:
    """How a KDA layer turns its logits into the log decay g and the write strength beta.

        g = -exp(A_log) softplus(gate_logits + dt_bias)                 form "softplus"
        g = lower_bound sigmoid(exp(A_log) (gate_logits + dt_bias))     form "bounded"
        beta = sigmoid(beta_logits), or twice that with negative_eigenvalues

    Args:
        A_log: H numbers, in any shape. None, as dt_bias, for a layer without decay (g = 0).
        dt_bias: as many numbers as the layer has gate logits per token: H K, or H for one decay per head.
        form: "softplus" or "bounded".
        lower_bound: the smallest g of the bounded form, in nats, in [-5, 0).
        negative_eigenvalues: whether beta is in [0, 2] instead of [0, 1].
    Raises: ValueError for another form or bound, or where only one of A_log and dt_bias is given.
    """

    A_log: Tensor | None = None
    dt_bias: Tensor | None = None
    form: str = "softplus"
    lower_bound: float = LOWEST_BOUND
    negative_eigenvalues: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"KDAGate: form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if not LOWEST_BOUND <= self.lower_bound < 0:
            raise InputError(f"KDAGate: lower_bound must be in [-5, 0), got {self.lower_bound}.")
        if (self.A_log is None) != (self.dt_bias is None):
            given, missing = ("dt_bias", "A_log") if self.A_log is None else ("A_log", "dt_bias")
            raise InputError(f"KDAGate: {given} needs {missing} too; give both, or neither for no decay.")

    @property
    def bounded(self) -> bool:
        return self.form == "bounded"

    @property
    def strength(self) -> float:
        """The largest beta."""
        return 2.0 if self.negative_eigenvalues else 1.0

    def check(self, fn: str, gate_logits: Tensor | None, sizes: dict[str, int]) -> None:
        """Raises ValueError unless these logits fit A_log and dt_bias.

        Args:
            fn: the function to name in the message.
            gate_logits: [B, T, H, K], [B, T, H], or None without decay.
            sizes: those of B, T, H and K.
        """
        if (gate_logits is None) != (self.A_log is None):
            raise InputError(f"{fn}: gate_logits, A_log and dt_bias come together, or none of them (no decay).")
        if gate_logits is None or self.A_log is None or self.dt_bias is None:
            return
        per_head = gate_logits.dim() == 3
        check_shape(fn, "gate_logits", gate_logits, "B T H" if per_head else "B T H K", sizes)
        wanted = sizes["H"] if per_head else sizes["H"] * sizes["K"]
        if self.A_log.numel() != sizes["H"] or self.dt_bias.numel() != wanted:
            raise InputError(
                f"{fn}: A_log must hold {sizes['H']} numbers and dt_bias {wanted}, "
                f"got {list(self.A_log.shape)} and {list(self.dt_bias.shape)}."
            )


def log_decay(gate_logits: Tensor, gate: KDAGate, *, head_dim: int) -> Tensor:
    """g [..., H, K] in nats, <= 0, in float32 at least.

    Args:
        gate_logits: [..., H, K], or [..., H, 1] for one decay per head.
        gate: with A_log and dt_bias.
        head_dim: K.
    """
    assert gate.A_log is not None
    assert gate.dt_bias is not None
    raw = at_least_float32(gate_logits) + at_least_float32(gate.dt_bias).view(gate_logits.shape[-2:])
    A = at_least_float32(gate.A_log).exp().view(-1, 1)
    g = gate.lower_bound * torch.sigmoid(A * raw) if gate.bounded else -A * F.softplus(raw)
    return g.expand(*gate_logits.shape[:-1], head_dim)


def write_strength(beta_logits: Tensor, gate: KDAGate) -> Tensor:
    """beta, of the shape of its logits, in float32 at least."""
    beta = torch.sigmoid(at_least_float32(beta_logits))
    return 2 * beta if gate.negative_eigenvalues else beta


def kda_gate_torch(
    gate_logits: Tensor | None, beta_logits: Tensor, gate: KDAGate, *, head_dim: int
) -> tuple[Tensor, Tensor]:
    """g [..., H, K] and beta [..., H], in float32 at least.

    Args:
        gate_logits: [..., H, K], [..., H] for one decay per head, or None for no decay (g = 0).
        beta_logits: [..., H].
        head_dim: K.
    """
    beta = write_strength(beta_logits, gate)
    if gate_logits is None:
        return beta.new_zeros(*beta.shape, head_dim), beta
    if gate_logits.dim() == beta_logits.dim():
        gate_logits = gate_logits.unsqueeze(-1)
    return log_decay(gate_logits, gate, head_dim=head_dim), beta
