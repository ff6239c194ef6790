"""The interface of a sequence mixer. A mixer has the name of its module in `lkda.models.mixers`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lkda.checks import InputError
from lkda.models.init import reset_children
from lkda.models.sequence_part import SequencePart

State = tuple[Tensor, ...]


class Mixer(nn.Module, ABC):
    """Mixes the tokens of a sequence causally, from d_model channels to d_model channels.

    A subclass is built as `Class(d_model, num_heads, *, <options>, backend="auto")`; its options are the keys of
    its YAML.

    Attributes:
        op: the operator in `lkda.ops` that it runs, and whose backends `backend` may name; None where it runs none.
        head_dim: d_model / num_heads.
        longest_sequence: tokens that no packed sequence exceeds, where whoever calls the model knows it; None where it
            is read from cu_seqlens, which makes a GPU wait.
        part: the part of each row that this device has, if several devices divide the rows among themselves; else None.
            It is set before each batch.
        recomputes: whether the backward of a mixer may compute again what its forward could keep. False where the whole
            block is computed again anyway.
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
        self.recomputes = True
        self.part: SequencePart | None = None
        self.num_heads = num_heads
        self.head_dim = d_model // num_heads

    def reset_parameters(self) -> None:
        """Initialises all weights again. A subclass with weights of its own initialises these too."""
        reset_children(self)

    @abstractmethod
    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """x [B, T, d_model] -> y of the same shape and the state after it. With a state, x continues its sequences.

        With cu_seqlens [N + 1], the row (B = 1) holds N independent sequences, which begin without a state. The state
        returned is then empty.
        """

    def forward_packed(self, x: Tensor, state: State, *, cu_seqlens: Tensor) -> tuple[Tensor, State]:
        """As `forward` with cu_seqlens [N + 1], with the state after each of the N sequences, none of them empty.

        Args:
            x: [1, T, d_model].
            state: of `init_state(N, max_tokens=...)`, which may be overwritten.
        """
        parts, after = [], []
        lengths = cu_seqlens.diff().tolist()
        for n, piece in enumerate(x.split(lengths, 1)):
            y, own = self(piece, state=tuple(part[n : n + 1] for part in state))
            parts.append(y)
            after.append(own)
        return torch.cat(parts, 1), tuple(torch.cat(rows) for rows in zip(*after, strict=True))

    @abstractmethod
    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token: x [B, d_model] -> y [B, d_model] and the state after it. No gradients pass through the state.

        A mixer may overwrite the tensors of the given state and return them. Clone the state first where it is needed
        again, for example to branch or to step back. `forward` changes only the caches of a state that was made with
        `max_tokens`.

        With a state that was made with `max_tokens`, a step on a GPU must not wait for the device, and its shapes must
        depend on those of its arguments alone, so that a CUDA graph can capture it.
        """

    @abstractmethod
    def init_state(
        self, batch_size: int, *, max_tokens: int | None = None, device: torch.device | None = None
    ) -> State:
        """The state before the first token: tensors [batch_size, ...].

        Args:
            max_tokens: the tokens for which a cache that grows is preallocated; None: it grows by copying. A mixer
                whose state has a constant size ignores it.
            device: None for that of the weights.
        """

    def cut_state(self, state: State, tokens: int) -> State:
        """Views of the part of a state made with `max_tokens` that sequences of up to `tokens` tokens use.

        A mixer whose state has a constant size returns the state.
        """
        return state

    def state_bytes(self, context: int) -> int:
        """Bytes of the state after one sequence of `context` tokens, with convolution caches."""
        state = self.init_state(1, device=torch.device("meta"))
        return sum(x.numel() * x.element_size() for x in state)

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """FLOPs of the forward pass per token, averaged over `context` tokens. A multiply-add counts two."""

    def heads(self, x: Tensor) -> Tensor:
        """[..., H * D] -> [..., H, D]"""
        return x.unflatten(-1, (self.num_heads, -1))


def refuse_packed_state(cu_seqlens: Tensor | None, state: State | None) -> None:
    """Raises ValueError where both are given: packed sequences cannot continue a state."""
    if cu_seqlens is not None and state is not None:
        raise InputError("state continues whole sequences [B, T]; it cannot be given together with cu_seqlens.")


def linear_flops(module: nn.Module) -> float:
    """FLOPs of one token in all linear layers inside `module`, each used once."""
    return float(sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear)))
