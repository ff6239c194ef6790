"""What the benchmark of one operator consists of."""

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
class Implementation:
    """One implementation of an operator: a backend of lkda, or a function of another library.

    Args:
        run: inputs -> outputs, of which the first is o. It calls the function that a user would call.
        gradients: names of the inputs that forward+backward differentiates; empty where there is no backward.
        adapt: the operator's inputs -> the inputs of this implementation; not part of the measured time.
        comparable: whether it computes the same function as the operator. Only then is an error measured.
    """

    run: Callable[[Inputs], Sequence[Tensor]]
    gradients: tuple[str, ...] = ()
    adapt: Callable[[Inputs], Inputs] = dict
    comparable: bool = True


@dataclass(frozen=True)
class OpBenchmark:
    """The benchmark of one operator.

    Args:
        op: the operator's name.
        gates: names of the regimes of the decay that are measured one by one; (None,) where there is only one.
        inputs: (shape, dtype, device, gate) -> random tensors [B, T, H, ...], by the names that `gradients` uses.
        moved_bytes: (shape, dtype, mode) -> the fewest bytes that must be read from and written to memory. Divided by
            the speed of a copy it is the memory lower bound. The mode is "fwd" or "fwd+bwd".
        backends: name of a backend of lkda -> its implementation.
        peers: name of another library -> a function that loads its implementations and raises ImportError where the
            library is not installed.
        truth: inputs in float64 -> outputs, by a form that the tests compare with the recurrence.
        kernels: (backend, mode, shape, dtype, arch) -> the kernels that run, for their registers and shared memory.
        results: names of the first outputs. Forward+backward differentiates these.
        has_reference: (input, shape) -> whether `truth` gives that input's gradient. It is evaluated on a few heads of
            one sequence, so it lacks gradients that are summed over all heads or sequences.
    """

    op: str
    gates: tuple[str | None, ...]
    inputs: Callable[[Shape, torch.dtype, torch.device, str | None], Inputs]
    moved_bytes: Callable[[Shape, torch.dtype, str], int]
    backends: Mapping[str, Implementation]
    peers: Mapping[str, Callable[[], Mapping[str, Implementation]]]
    truth: Callable[[Inputs], Sequence[Tensor]]
    kernels: Callable[[str, str, Shape, torch.dtype, str], list[Kernel]]
    results: tuple[str, ...] = ("o",)
    has_reference: Callable[[str, Shape], bool] = lambda name, shape: True
