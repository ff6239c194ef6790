"""The chunked kernels, a variant for each head size, dtype and architecture: their sizes, and what a launch needs.

docs/dev/kernels.md explains the kernels. `lkda.ops.kda.cuda.core` launches them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from lkda.ops.runtime.jit import SHARED_BYTES_PER_BLOCK, Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS

HERE = Path(__file__).parent

LEAF = 8
WARPGROUPS = True  # where the scans may multiply by four warps at once (wgmma, sm_90a), they do
MOST_STAGES = 3  # chunks of the scan in shared memory: the one at work and those being fetched


def chunk_of(dtype: torch.dtype) -> int:
    """C, tokens of a chunk."""
    return 32 if dtype == torch.float32 else 64


def packet_bytes(D: int, dtype: torch.dtype) -> int:
    C, size = chunk_of(dtype), 4 if dtype == torch.float32 else 2
    return 3 * C * D * size + C * C * size + 4 * D + 4 * C


def kept_state_bytes(D: int, dtype: torch.dtype) -> int:
    return 4 * D * D if dtype == torch.float32 else 2 * D * D + 128


class Layout:
    """Sizes of the kernels for heads of D and a dtype, as the .cu files compute them (and check at compile time).

    Attributes:
        chunk: C. Half-precision inputs are multiplied in fp16 and units (kda_unit.cuh), float32 in tf32.
        packet, kept_state, columns: bytes of a Packet, of a Kept state and of [V, C] in the operands' type.
        threads: of the chunk-parallel kernels.   resident: blocks of `prepare` that a multiprocessor holds at most.
        warps: of the scans, 16 columns of V each.
    """

    def __init__(self, D: int, dtype: torch.dtype):
        wide = dtype == torch.float32
        self.D, self.item = D, dtype.itemsize
        self.chunk = C = chunk_of(dtype)
        self.operand = size = 4 if wide else 2
        self.levels = 2 if wide else 3
        self.leaves = C // LEAF
        self.packet = packet_bytes(D, dtype)
        self.kept_state = kept_state_bytes(D, dtype)
        self.columns = D * C * size
        self.threads = D * self.leaves // 2
        self.resident = max(1, (384 if wide else 512) // self.threads)
        self.warps = min(4, D // 16)
        self.defines: dict[str, str | int | float] = {
            "HEAD_DIM": D,
            "CHUNK": C,
            "ELEMENT": ELEMENTS[dtype],
            "OPERAND": "tf32" if wide else "float16",
        }

    def prepare_shared(self) -> int:
        C, D, size = self.chunk, self.D, self.operand
        small = _round_up(4 * self.leaves * D + 4 * C + 4 * C * 17, 128)
        tree = self.levels * (C + C // 2) * D * size
        return small + 2 * C * C * size + max(tree, 2 * C * C * size + 64 * C)

    def stage(self, streams: int, warps: int) -> int:
        """Of a scan that reads `streams` tensors beside the packet: v, and backwards dO."""
        values = self.chunk * min(16 * warps, self.D) * self.item
        return _round_up(_round_up(self.packet, 128) + streams * values, 1024)

    def gradients_shared(self, roomy: bool) -> int:
        C, D, size = self.chunk, self.D, self.operand
        slice_ = 32 if D == 32 or size == 4 else 64
        small = _round_up(4 * ((self.levels + 2) * self.leaves + C // 16) * D + 4 * C + 288 + 8 * 64 * self.leaves, 128)
        slices = 2 * slice_ * (D + C) * size + C * slice_ * self.item
        level = (C + C // 2) * D * size
        operands = self.levels * level + 3 * 4 * C * D if roomy else level
        return small + self.levels * C * (C // 2) * size + max(slices, operands)

    def room(self, shared_bytes: int, arch: str) -> dict[str, str | int | float]:
        """Of a chunk-parallel kernel: its shared memory, and how many of its blocks a multiprocessor should hold.

        In half precision 128 registers a thread are enough; float32 has all it wants.
        """
        fit = SHARED_BYTES_PER_BLOCK[arch] // shared_bytes
        resident = 1 if self.operand == 4 else max(1, min(2, 512 // self.threads, fit))
        return {"SHARED_BYTES": shared_bytes, "RESIDENT": resident}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@cache
def layout_of(D: int, dtype: torch.dtype) -> Layout:
    return Layout(D, dtype)


@cache
def prepare_kernel(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> Kernel:
    """Of q and k of dtype `query`, of which alone it reads; beside v of `dtype`, which is theirs where None."""
    layout = layout_of(D, query or dtype)
    shared_bytes = layout.prepare_shared()
    defines = layout.defines | layout.room(shared_bytes, arch)
    module = Module(HERE / "prepare.cu", defines)
    module.companions = lambda: (
        gradients_kernel(D, dtype, arch, query).module,
        *(scan_of(name, D, dtype, arch, "whole").kernel.module for name in ("reverse", "scan")),
    )
    return module.kernel("kda_prepare", "PPPPPPiiif", shared_bytes=shared_bytes)


class Scan:
    """A scan over chunks: `scan` or `reverse`, of whole sequences or of segments, or the segments' `summary`.

    Attributes:
        warps: of a block, 16 columns each.
        blocks: of a head of a segment.
    """

    def __init__(self, name: str, D: int, dtype: torch.dtype, arch: str, part: str):
        layout = layout_of(D, dtype)
        summary = part == "summary"
        columns = 2 * D if summary and name == "scan" else D
        self.warps = layout.warps if part == "whole" else min(8, columns // 16)
        self.blocks = columns // 16 // self.warps
        stage = layout.stage(2 if name == "reverse" and not summary else 1, self.warps)
        stages = min(MOST_STAGES, SHARED_BYTES_PER_BLOCK[arch] // stage)
        shared_bytes = stages * stage
        groups = WARPGROUPS and arch == "sm_90a" and layout.operand == 2 and D % 64 == 0
        defines = layout.defines | {"WARPS": self.warps, "STAGES": stages, "SHARED_BYTES": shared_bytes}
        module = Module(HERE / f"{name}.cu", defines | {"SUMMARY": int(summary), "WARPGROUPS": int(groups)})
        self.kernel = module.kernel(
            f"kda_{name}", "P" * (13 if name == "scan" else 12) + "iiii", shared_bytes=shared_bytes
        )


@cache
def scan_of(name: str, D: int, dtype: torch.dtype, arch: str, part: str) -> Scan:
    return Scan(name, D, dtype, arch, part)


def parts_of(D: int) -> tuple[str, ...]:
    """Those of a scan with kernels of their own. Of a segment a block holds all columns, as of small heads anyway."""
    return ("whole", "summary") if D // 16 <= 4 else ("whole", "segment", "summary")


@cache
def segments_kernel(D: int, arch: str) -> Kernel:
    sums = 4 * D * 8 + 4 * 8 * 8 * (D + 4)  # a state's eight columns, and partial sums of the next
    stage = 4 * D * 4 * (D // 16)  # four rows a warp
    stages = min(12, max(3, (SHARED_BYTES_PER_BLOCK[arch] // 2 - sums) // stage))  # room for two blocks, where it does
    shared_bytes = sums + stages * stage
    defines = layout_of(D, torch.float32).defines | {"STAGES": stages, "SHARED_BYTES": shared_bytes}
    return Module(HERE / "segments.cu", defines).kernel("kda_segments", "PPPPiii", shared_bytes=shared_bytes)


@cache
def gradients_kernel(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> Kernel:
    """With q and k of dtype `query`, `dtype` where None."""
    layout = layout_of(D, dtype)
    roomy = SHARED_BYTES_PER_BLOCK[arch] >= layout.gradients_shared(True) * (2 if D < 128 else 1)
    shared_bytes = layout.gradients_shared(roomy)
    more = layout.room(shared_bytes, arch) | {"ROOMY": int(roomy), "QUERY": ELEMENTS[query or dtype]}
    module = Module(HERE / "gradients.cu", layout.defines | more)
    return module.kernel("kda_gradients", "P" * 20 + "iif", shared_bytes=shared_bytes)


@cache
def largest_kernel(D: int, dtype: torch.dtype) -> Kernel:
    return Module(HERE / "largest.cu", layout_of(D, dtype).defines).kernel("kda_largest", "PPPiii")


@cache
def sequences_kernel(dtype: torch.dtype) -> Kernel:
    return Module(HERE / "sequences.cu", layout_of(64, dtype).defines).kernel("kda_sequences", "PPPii")


def kernels(arch: str) -> list[Kernel]:
    """Every kernel that runs on `arch`, for every head size and dtype."""
    variants = [(D, dtype) for D in HEAD_DIMS for dtype in ELEMENTS]
    chunked = [kernel(*variant, arch) for kernel in (prepare_kernel, gradients_kernel) for variant in variants]
    scans = [
        scan_of(name, *variant, arch, part).kernel
        for name in ("scan", "reverse")
        for variant in variants
        for part in parts_of(variant[0])
    ]
    return (
        chunked
        + [gradients_kernel(D, torch.bfloat16, arch, torch.float16) for D in HEAD_DIMS]
        + scans
        + [segments_kernel(D, arch) for D in HEAD_DIMS]
        + [largest_kernel(D, dtype) for D, dtype in variants if dtype.itemsize == 2]
        + [sequences_kernel(torch.bfloat16), sequences_kernel(torch.float32)]
    )
