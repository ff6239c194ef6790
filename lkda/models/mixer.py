"""What a sequence mixer is: one class, one contract. Its name is its module in `lkda.models.mixers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.init import reset_children

State = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """Mixes tokens of a sequence causally; d_model in, d_model out.

    A subclass is built as `Class(d_model, num_heads, *, <options>, backend="auto")`; its options are its YAML's keys.

    Attributes:
        op: the operator in `lkda.ops` that it runs, and whose backends `backend` may name; None where it runs none.
        head_dim: d_model / num_heads.
        longest_sequence: tokens that no packed sequence exceeds, where whoever calls the model knows it; None where it
            is read from cu_seqlens, which makes a GPU wait.
    """

    op: ClassVar[str | None] = None

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or d_model % num_heads:
            raise InputError(
                f"mixer.num_heads must divide model.d_model = {d_model}, got {num_heads!r}; "
                f"choose one of {[h for h in range(1, d_model + 1) if d_model % h == 0][:12]}."
            )
        self.longest_sequence: int | None = None
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads

    def reset_parameters(self) -> None:
        """Draw all weights anew, as a new layer has them; a subclass with weights of its own draws these too."""
        reset_children(self)

    @abstractmethod
    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, d_model] -> y of that shape, and the state after it. A given state continues the sequences.

        With cu_seqlens [N + 1] the row (B = 1) holds N sequences that never see each other; they start afresh, and the
        state returned is empty.
        """

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, d_model] -> y [B, d_model], and the state after it; no gradients pass the state.

        The given state is spent: a mixer may write into its tensors, and the state returned may be these same tensors.
        Who needs it again (to branch, to step back) clones it first. `forward` leaves the state it is given alone.
        """

    @abstractmethod
    def init_state(self, batch_size: int, *, device: torch.device | None = None) -> State:
        """The state before the first token; tensors of [batch_size, ...]."""

    def state_bytes(self, context: int) -> int:
        """Bytes that one sequence of `context` tokens leaves behind, convolution caches included."""
        state = self.init_state(1, device=torch.device("meta"))
        return sum(x.numel() * x.element_size() for x in state)

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Of the forward, a multiply-add counting two, averaged over a sequence of `context` tokens."""

    def heads(self, x: Tensor) -> Tensor:
        """[..., H * D] -> [..., H, D]"""
        return x.unflatten(-1, (self.num_heads, -1))


def refuse_packed_state(cu_seqlens: Tensor | None, state: State | None) -> None:
    """Packed sequences start afresh: carrying a state into them would need one a sequence."""
    if cu_seqlens is not None and state is not None:
        raise InputError("state continues whole sequences [B, T]; it cannot be given together with cu_seqlens.")


def linear_flops(module: nn.Module) -> float:
    """Of one token through every linear layer inside `module`, each used once."""
    return float(sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)))
