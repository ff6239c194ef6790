"""What a benchmark of an operator consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.jit import Kernel

Inputs = dict[str, Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads of D channels."""

    B: int
    T: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"{self.B}x{self.T}x{self.H}x{self.D}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "8x8192x16x64". Raises ValueError for anything else."""
        sizes = str(text).split("x")
        if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise InputError(f"a shape is B x T x H x D, as in 8x8192x16x64, got {text}.")
        return cls(*(int(size) for size in sizes))

    @property
    def elements(self) -> int:
        return self.B * self.T * self.H * self.D


@dataclass(frozen=True)
class Entrant:
    """One implementation.

    Args:
        run: inputs -> outputs, the first of which is o; through the function that a user calls.
        gradients: the inputs that forward+backward differentiates; none where there is no backward.
        adapt: the op's inputs -> this entrant's own, before the clock starts.
        comparable: whether its outputs and gradients are the op's, so that an error can be told.
    """

    run: Callable[[Inputs], Sequence[Tensor]]
    gradients: tuple[str, ...] = ()
    adapt: Callable[[Inputs], Inputs] = dict
    comparable: bool = True


@dataclass(frozen=True)
class Contest:
    """An operator's benchmark.

    Args:
        op: its name.
        gates: regimes of the inputs that are worth telling apart; (None,) where there is one.
        inputs: (shape, dtype, device, gate) -> random tensors [B, T, H, ...], by the names that `gradients` uses.
        moved_bytes: (shape, dtype, mode) -> the fewest bytes to and from memory, mode "fwd" or "fwd+bwd".
        backends: word -> our implementation.
        peers: family -> a loader of its entrants, which raises ImportError where the family is not installed.
        truth: inputs in float64 -> outputs, by a form that the tests hold against the recurrence.
        kernels: (word, mode, shape, dtype, arch) -> the kernels that run, for their registers and shared memory.
        results: the first outputs, by name: those that forward+backward differentiates.
        told: (input, shape) -> whether the error of its gradient can be told from a few heads of one sequence.
    """

    op: str
    gates: tuple[str | None, ...]
    inputs: Callable[[Shape, torch.dtype, torch.device, str | None], Inputs]
    moved_bytes: Callable[[Shape, torch.dtype, str], int]
    backends: Mapping[str, Entrant]
    peers: Mapping[str, Callable[[], Mapping[str, Entrant]]]
    truth: Callable[[Inputs], Sequence[Tensor]]
    kernels: Callable[[str, str, Shape, torch.dtype, str], list[Kernel]]
    results: tuple[str, ...] = ("o",)
    told: Callable[[str, Shape], bool] = lambda name, shape: True
