"""The lessons of the notes as variants of kernels: each changes one choice.

ablations.cu is simplified linear attention with the choices of a kernel that is bound by memory; KDA's recurrent kernel
shows registers and occupancy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from lkda.bench.op_benchmark import Implementation, Inputs, Shape
from lkda.ops import simplified_attention
from lkda.ops.kda.cuda.recurrent import Variant, forward, recurrent_kernel
from lkda.ops.runtime.jit import Kernel, Module, architecture, multiprocessors
from lkda.ops.simplified.cuda import core

# B, T and H, with as many tokens in all. A kernel with one block per head and sequence has 128, 1,024 and 16 blocks:
# about one for each multiprocessor, several, and too few.
SIZES = ((8, 8192, 16), (64, 1024, 16), (1, 65_536, 16))
THREADS = 256  # of ablations.cu


@dataclass(frozen=True)
class Choices:
    """Of the kernel in ablations.cu; the defaults are those of the notes' tuned kernel.

    Args:
        load_bytes: that a thread copies with one instruction.
        loaders: threads of a block that copy.
        channels: the number of channels of a head that one block has.
        shared_kib: that a block may use.
    """

    load_bytes: int = 16
    loaders: int = 256
    channels: int = 64
    shared_kib: int = 96

    @property
    def strips(self) -> int:
        return THREADS // (self.channels // 2)

    @property
    def tokens(self) -> int:
        """In shared memory at a time. A strip has an odd number of them, so that two strips of a warp read different
        banks."""
        each = (self.shared_kib * 1024 - self._exchange) // (2 * self._token * self.strips)
        return (each - 1 + each % 2) * self.strips

    @property
    def shared_bytes(self) -> int:
        """sizeof(Shared) of ablations.cu."""
        return 2 * self._token * self.tokens + self._exchange

    @property
    def _token(self) -> int:
        return 3 * self.channels * 2 + 4

    @property
    def _exchange(self) -> int:
        return 16 * THREADS + 4 * self.strips


NOTES = Choices()
SIMPLIFIED: Mapping[str, Choices] = {
    "the notes' choices": NOTES,
    "8-byte loads": replace(NOTES, load_bytes=8),
    "4-byte loads": replace(NOTES, load_bytes=4),
    "48 KB of shared memory": replace(NOTES, shared_kib=48),
    "24 KB of shared memory": replace(NOTES, shared_kib=24),
    "blocks of 32 channels": replace(NOTES, channels=32),
    "blocks of 16 channels": replace(NOTES, channels=16),
    "32 threads load": replace(NOTES, loaders=32),
    "4 bytes, 24 KB, 16 channels, 32 threads": Choices(4, 32, 16, 24),
}
HEAD_DIM = 64
# Of heads of 128. A multiprocessor has 65,536 registers: 2 or 4 blocks of 256 threads leave 128 or 64 to each thread.
RECURRENT: Mapping[str, Variant] = {
    "2 threads per column": Variant(2),
    "2 threads per column, 128 registers at most": Variant(2, blocks=2),
    "2 threads per column, 64 registers at most": Variant(2, blocks=4),
    "4 threads per column": Variant(4),
    "8 threads per column": Variant(8),
}
RECURRENT_HEAD_DIM = 128


@cache
def ablation_kernel(choices: Choices) -> Kernel:
    defines: dict[str, str | int | float] = {
        "HEAD_DIM": HEAD_DIM,
        "ELEMENT": "bfloat16",
        "LOAD_BYTES": choices.load_bytes,
        "LOADERS": choices.loaders,
        "CHANNELS": choices.channels,
        "TOKENS": choices.tokens,
        "SHARED_BYTES": choices.shared_bytes,
    }
    module = Module(Path(__file__).with_name("ablations.cu"), defines)
    return module.kernel("simplified_ablation", "PPPPPii", shared_bytes=choices.shared_bytes)


def kernels(arch: str) -> list[Kernel]:
    """The kernels of the ablations, without those that are made to spill. They are the same on all architectures."""
    free = [variant for variant in RECURRENT.values() if variant.blocks == 1]
    return [ablation_kernel(choices) for choices in SIMPLIFIED.values()] + [_recurrent_kernel(v) for v in free]


def _recurrent_kernel(variant: Variant) -> Kernel:
    return recurrent_kernel(RECURRENT_HEAD_DIM, torch.bfloat16, variant)


@dataclass(frozen=True)
class Ablation:
    """One variant of a kernel.

    Args:
        op: whose inputs it takes.
        threads: the number of threads of a block.
        blocks: shape -> of a launch.
    """

    op: str
    option: str
    kernel: Kernel
    threads: int
    blocks: Callable[[Shape], int]
    implementation: Implementation


def run_simplified(inputs: Inputs, choices: Choices) -> tuple[torch.Tensor]:
    """o of `simplified_attention`, for bf16 inputs with heads of HEAD_DIM and a float32 decay."""
    q, k, v, decay = (inputs[name].contiguous() for name in ("q", "k", "v", "decay"))
    B, T, H, D = q.shape
    o = torch.empty_like(q)
    grid = (B * H * D // choices.channels, 1, 1)
    ablation_kernel(choices)(grid, THREADS, q, k, v, decay, o, T, H, device=q.device)
    return (o,)


def run_recurrent(inputs: Inputs, variant: Variant) -> tuple[torch.Tensor]:
    """o of `kda_attention`, with the variant of the recurrent kernel."""
    q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    return forward(q, k, v, g, beta, None, None, q.shape[-1] ** -0.5, variant=variant)[:1]


def ablations(device: torch.device) -> list[tuple[Ablation, Shape]]:
    """What is measured, with its shape; the first variant of each operator is what the others are compared with."""
    simplified = [_simplified(option, choices) for option, choices in SIMPLIFIED.items()]
    simplified.append(_parallel_over_time(device))
    found = [(one, Shape(*sizes, HEAD_DIM)) for sizes in SIZES for one in simplified]
    recurrent = [_recurrent(option, variant) for option, variant in RECURRENT.items()]
    return found + [(one, Shape(*sizes, RECURRENT_HEAD_DIM)) for sizes in SIZES[:2] for one in recurrent]


def _simplified(option: str, choices: Choices) -> Ablation:
    implementation = Implementation(partial(run_simplified, choices=choices))
    blocks = _blocks_of(HEAD_DIM // choices.channels)
    return Ablation("simplified", option, ablation_kernel(choices), THREADS, blocks, implementation)


def _parallel_over_time(device: torch.device) -> Ablation:
    """The tuned kernel of lkda. Its blocks share the tokens of a sequence."""
    kernel = core.scan_kernel("forward", architecture(device), HEAD_DIM, torch.bfloat16, packed=False)
    blocks = core.BLOCKS * multiprocessors(device)
    implementation = Implementation(lambda inputs: simplified_attention(**inputs, backend="cuda"))
    option = "parallel over time (lkda's tuned kernel)"
    return Ablation("simplified", option, kernel, core.THREADS, lambda shape: blocks, implementation)


def _recurrent(option: str, variant: Variant) -> Ablation:
    implementation = Implementation(partial(run_recurrent, variant=variant))
    threads = variant.column_threads * RECURRENT_HEAD_DIM
    return Ablation("kda", option, _recurrent_kernel(variant), threads, _blocks_of(1), implementation)


def _blocks_of(parts: int) -> Callable[[Shape], int]:
    return lambda shape: shape.B * shape.H * parts
