"""The variants of the chunked kernels: one for each head size, dtype and architecture, with the sizes of a launch.

docs/dev/kernels.md explains the kernels. `lkda.ops.kda.cuda.plan` binds them to a shape, `core` launches them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from lkda.ops.runtime.jit import SHARED_BYTES_PER_BLOCK, Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS

HERE = Path(__file__).parent

LEAF = 8
WARPGROUPS = True  # whether the inter-chunk kernels use wgmma where there is one (sm_90a)
HELPER_WARPS = 2  # in a block of intra_chunk_fwd_helpers.cu, besides those that a block of intra_chunk_fwd.cu has
MAX_STAGES = 3  # chunks in the shared memory of an inter-chunk kernel: one is computed on, the others are being fetched
INTER_CHUNK = ("inter_chunk_fwd", "inter_chunk_bwd")


def chunk_of(dtype: torch.dtype) -> int:
    """C, the number of tokens in a chunk."""
    return 32 if dtype == torch.float32 else 64


def workspace_bytes(D: int, dtype: torch.dtype) -> int:
    C, size = chunk_of(dtype), 4 if dtype == torch.float32 else 2
    return 3 * C * D * size + C * C * size + 4 * D + 4 * C


def saved_state_bytes(D: int, dtype: torch.dtype) -> int:
    return 4 * D * D if dtype == torch.float32 else 2 * D * D + 128


class Layout:
    """Sizes of the kernels for a head dimension D and a dtype.

    The .cu files compute the same sizes and compare them with these at compile time.

    Attributes:
        chunk: C, tokens. Half-precision inputs are multiplied in float16 with power-of-two scales (kda_scale.cuh),
            float32 inputs in tf32.
        operand: bytes of a number that the tensor cores multiply.
        workspace, saved_state: bytes of a ChunkWorkspace and of a SavedState (kda_chunk.cuh).
        columns: bytes of a [V, C] matrix in the operands' type.
        threads: threads in a block of an intra-chunk kernel.
        resident: the largest number of blocks of intra_chunk_fwd that one multiprocessor holds.
        warps: warps in a block of an inter-chunk kernel; each has 16 columns of V.
    """

    def __init__(self, D: int, dtype: torch.dtype):
        wide = dtype == torch.float32
        self.D, self.item = D, dtype.itemsize
        self.chunk = C = chunk_of(dtype)
        self.operand = size = 4 if wide else 2
        self.levels = 2 if wide else 3
        self.leaves = C // LEAF
        self.workspace = workspace_bytes(D, dtype)
        self.saved_state = saved_state_bytes(D, dtype)
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

    def intra_chunk_fwd_shared(self, helpers: bool) -> int:
        C, D, size = self.chunk, self.D, self.operand
        small = 4 * self.leaves * D + 4 * C + 4 * C * 17
        tree, inverse = self.levels * (C + C // 2) * D * size, 2 * C * C * size + 64 * C
        if not helpers:
            return _round_up(small, 128) + 2 * C * C * size + max(tree, inverse)
        leaf_operands = 24 * 64 * 2 * (self.threads // 32)
        return _round_up(small + 8 * HELPER_WARPS, 128) + 2 * C * C * size + leaf_operands + tree + inverse

    def stage(self, streams: int, warps: int) -> int:
        """Bytes of one stage of an inter-chunk kernel: a workspace, and a chunk's rows of `streams` tensors.

        The forward reads one tensor (v), the backward two (v and do).
        """
        values = self.chunk * min(16 * warps, self.D) * self.item
        return _round_up(_round_up(self.workspace, 128) + streams * values, 1024)

    def chunk_fwd_shared(self, teams: int) -> int:
        """A team has what a block of intra_chunk_fwd.cu has, but for the C x C matrix of Aqk and T~."""
        C, D = self.chunk, self.D
        team = self.intra_chunk_fwd_shared(False) - C * C * self.operand
        return (teams + 1) * _round_up(self.workspace, 1024) + C * D * self.item + teams * team

    def chunk_fwd_pair_shared(self) -> int:
        """As chunk_fwd_shared, for one team and half of V. Operands of two levels are in the place of k_in, qg and kg,
        and there are six signals of 8 bytes."""
        C, D = self.chunk, self.D
        team = self.intra_chunk_fwd_shared(False) - C * C * self.operand - 3 * C * D * self.operand
        return 3 * _round_up(self.workspace, 1024) + C * D // 2 * self.item + team + 6 * 8

    def intra_chunk_bwd_shared(self, roomy: bool, persistent: bool = False) -> int:
        C, D, size = self.chunk, self.D, self.operand
        slice_ = 32 if D == 32 or size == 4 else 64
        small = _round_up(4 * ((self.levels + 2) * self.leaves + C // 16) * D + 4 * C + 288 + 8 * 64 * self.leaves, 128)
        slices = 2 * slice_ * (D + C) * size + C * slice_ * self.item
        level = (C + C // 2) * D * size
        operands = self.levels * level + 3 * 4 * C * D if roomy else level
        copied = C * D * 2 + 4 * C * (D // 16) + 4 * C + 32 if persistent else 0
        return small + self.levels * C * (C // 2) * size + max(slices, operands) + copied

    def room(self, shared_bytes: int, arch: str) -> dict[str, str | int | float]:
        """Macros of an intra-chunk kernel: its shared memory, and how many blocks one multiprocessor should hold.

        In half precision 128 registers per thread are enough, so two blocks may fit; float32 gets all registers.
        """
        fit = SHARED_BYTES_PER_BLOCK[arch] // shared_bytes
        resident = 1 if self.operand == 4 else max(1, min(2, 512 // self.threads, fit))
        return {"SHARED_BYTES": shared_bytes, "RESIDENT": resident}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@cache
def layout_of(D: int, dtype: torch.dtype) -> Layout:
    return Layout(D, dtype)


class IntraChunkFwd:
    """The kernel intra_chunk_fwd: intra_chunk_fwd_helpers.cu for heads of 128 in half precision on Hopper, else
    intra_chunk_fwd.cu.

    Args:
        query: the dtype of q and k, where v is of `dtype`. None: all three are of `dtype`.

    Attributes:
        helpers: whether it is the kernel with helper warps, which takes v too and finds the largest |v|.
        threads: threads in a block.
    """

    def __init__(self, D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None):
        layout = layout_of(D, query or dtype)
        self.helpers = D == 128 and layout.operand == 2 and arch == "sm_90a"
        self.threads = layout.threads + (32 * HELPER_WARPS if self.helpers else 0)
        shared_bytes = layout.intra_chunk_fwd_shared(self.helpers)
        defines = layout.defines | layout.room(shared_bytes, arch)
        source, signature = "intra_chunk_fwd.cu", "PPPPPPiiif"
        if self.helpers:
            source, signature = "intra_chunk_fwd_helpers.cu", "PPPPPPPPiiif"
            defines |= {"VALUE": ELEMENTS[dtype], "HELPER_WARPS": HELPER_WARPS}
        module = Module(HERE / source, defines)
        module.precompile_with = lambda: (
            intra_chunk_bwd_kernel(D, dtype, arch, query).module,
            *(inter_chunk_kernel(name, D, dtype, arch, "whole").kernel.module for name in INTER_CHUNK),
        )
        self.kernel = module.kernel("kda_intra_chunk_fwd", signature, shared_bytes=shared_bytes)


@cache
def intra_chunk_fwd(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> IntraChunkFwd:
    return IntraChunkFwd(D, dtype, arch, query)


def intra_chunk_fwd_kernel(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> Kernel:
    return intra_chunk_fwd(D, dtype, arch, query).kernel


# Registers of a thread of a team and of a scanner, for each head size that has the kernel. Together they are what a
# launch gives: 96 for each of 640 threads.
CHUNK_FWD_REGISTERS = {64: (88, 128), 128: (72, 192)}


class ChunkFwd:
    """The kernel chunk_fwd.cu or, for heads of 128, chunk_fwd_pair.cu: the whole forward in half precision on Hopper.

    Args:
        query: the dtype of q and k, where v is of `dtype`. None: all three are of `dtype`.
        saves: whether a backward follows, for heads of 128.

    Attributes:
        threads: threads in a block: 16 warps in one or two teams, and 4 scanners.
        blocks: blocks for one head of one sequence. Two are a cluster.
    """

    def __init__(self, D: int, dtype: torch.dtype, query: torch.dtype | None = None, saves: bool = False):
        layout = layout_of(D, query or dtype)
        self.threads, self.blocks = 512 + 128, D // 64
        shared_bytes = layout.chunk_fwd_shared(teams=2) if D == 64 else layout.chunk_fwd_pair_shared()
        team, scanner = CHUNK_FWD_REGISTERS[D]
        defines = layout.defines | {
            "VALUE": ELEMENTS[dtype],
            "WARPGROUPS": 1,
            "SAVES": int(saves),
            "TEAM_REGISTERS": team,
            "SCANNER_REGISTERS": scanner,
            "SHARED_BYTES": shared_bytes,
        }
        name = "chunk_fwd" if D == 64 else "chunk_fwd_pair"
        entry, signature = (f"kda_{name}_saves", "P" * 13 + "iif") if saves else (f"kda_{name}", "P" * 8 + "iif")
        self.kernel = Module(HERE / f"{name}.cu", defines).kernel(entry, signature, shared_bytes=shared_bytes)


@cache
def chunk_fwd(D: int, dtype: torch.dtype, query: torch.dtype | None = None, saves: bool = False) -> ChunkFwd:
    return ChunkFwd(D, dtype, None if query == dtype else query, saves)


# The dtypes of v, and of q and k where they have another.
CHUNK_FWD_DTYPES = ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float16))


def has_chunk_fwd(D: int, dtype: torch.dtype, arch: str) -> bool:
    return D in CHUNK_FWD_REGISTERS and dtype.itemsize == 2 and arch == "sm_90a"


class InterChunkKernel:
    """A kernel that goes from chunk to chunk.

    Args:
        name: inter_chunk_fwd or inter_chunk_bwd.
        part: what a block goes through: a "whole" sequence, a "segment" of one, or a segment for its "summary" alone
            (A and Z, see segments.py).

    Attributes:
        warps: warps in a block; each has 16 columns.
        blocks: blocks for one head of one segment.
    """

    def __init__(self, name: str, D: int, dtype: torch.dtype, arch: str, part: str):
        layout = layout_of(D, dtype)
        summary = part == "summary"
        forward = name == "inter_chunk_fwd"
        columns = 2 * D if summary and forward else D
        self.warps = layout.warps if part == "whole" else min(8, columns // 16)
        self.blocks = columns // 16 // self.warps
        stage = layout.stage(1 if forward or summary else 2, self.warps)
        stages = min(MAX_STAGES, SHARED_BYTES_PER_BLOCK[arch] // stage)
        shared_bytes = stages * stage
        groups = WARPGROUPS and arch == "sm_90a" and layout.operand == 2 and D % 64 == 0
        defines = layout.defines | {"WARPS": self.warps, "STAGES": stages, "SHARED_BYTES": shared_bytes}
        module = Module(HERE / f"{name}.cu", defines | {"SUMMARY": int(summary), "WARPGROUPS": int(groups)})
        self.kernel = module.kernel(f"kda_{name}", "P" * (14 if forward else 13) + "iiiii", shared_bytes=shared_bytes)


@cache
def inter_chunk_kernel(name: str, D: int, dtype: torch.dtype, arch: str, part: str) -> InterChunkKernel:
    return InterChunkKernel(name, D, dtype, arch, part)


def parts_of(D: int) -> tuple[str, ...]:
    """The parts that have a kernel of their own. A segment's block has all columns of V, and for a small head so does
    the block of a whole sequence: then one kernel serves both."""
    return ("whole", "summary") if D // 16 <= 4 else ("whole", "segment", "summary")


@cache
def segments_kernel(D: int, arch: str) -> Kernel:
    sums = 4 * D * 8 + 4 * 8 * 8 * (D + 4)  # a state's eight columns, and partial sums of the next
    stage = 4 * D * 4 * (D // 16)  # four rows a warp
    stages = min(12, max(3, (SHARED_BYTES_PER_BLOCK[arch] // 2 - sums) // stage))  # two blocks per multiprocessor
    shared_bytes = sums + stages * stage
    defines = layout_of(D, torch.float32).defines | {"STAGES": stages, "SHARED_BYTES": shared_bytes}
    return Module(HERE / "segments.cu", defines).kernel("kda_segments", "PPPPPiii", shared_bytes=shared_bytes)


class IntraChunkBwd:
    """The kernel intra_chunk_bwd.

    Args:
        query: the dtype of q and k, where the others are of `dtype`. None: all are of `dtype`.

    Attributes:
        persistent: whether a block works on several chunks. Else each chunk and head needs a block.
    """

    def __init__(self, D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None):
        layout = layout_of(D, dtype)
        roomy = SHARED_BYTES_PER_BLOCK[arch] >= layout.intra_chunk_bwd_shared(True) * (2 if D < 128 else 1)
        self.persistent = D == 128 and layout.operand == 2 and arch == "sm_90a"  # on sm_100a it would spill
        shared_bytes = layout.intra_chunk_bwd_shared(roomy, self.persistent)
        more = layout.room(shared_bytes, arch) | {"ROOMY": int(roomy), "QUERY": ELEMENTS[query or dtype]}
        more |= {"PERSISTENT": int(self.persistent)}
        module = Module(HERE / "intra_chunk_bwd.cu", layout.defines | more)
        self.kernel = module.kernel("kda_intra_chunk_bwd", "P" * 20 + "iiif", shared_bytes=shared_bytes)


@cache
def intra_chunk_bwd(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> IntraChunkBwd:
    return IntraChunkBwd(D, dtype, arch, query)


def intra_chunk_bwd_kernel(D: int, dtype: torch.dtype, arch: str, query: torch.dtype | None = None) -> Kernel:
    return intra_chunk_bwd(D, dtype, arch, query).kernel


@cache
def amax_kernel(D: int, dtype: torch.dtype) -> Kernel:
    return Module(HERE / "amax.cu", layout_of(D, dtype).defines).kernel("kda_amax", "PPPiii")


@cache
def sequences_kernel(dtype: torch.dtype) -> Kernel:
    return Module(HERE / "sequences.cu", layout_of(64, dtype).defines).kernel("kda_sequences", "PPPii")


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    variants = [(D, dtype) for D in HEAD_DIMS for dtype in ELEMENTS]
    intra_chunk = [
        kernel(*variant, arch) for kernel in (intra_chunk_fwd_kernel, intra_chunk_bwd_kernel) for variant in variants
    ]
    inter_chunk = [
        inter_chunk_kernel(name, *variant, arch, part).kernel
        for name in INTER_CHUNK
        for variant in variants
        for part in parts_of(variant[0])
    ]
    return (
        intra_chunk
        + [
            intra_chunk_fwd_kernel(D, torch.bfloat16, arch, torch.float16)
            for D in HEAD_DIMS
            if intra_chunk_fwd(D, torch.bfloat16, arch).helpers
        ]
        + [intra_chunk_bwd_kernel(D, torch.bfloat16, arch, torch.float16) for D in HEAD_DIMS]
        + inter_chunk
        + [segments_kernel(D, arch) for D in HEAD_DIMS]
        + [amax_kernel(D, dtype) for D, dtype in variants if dtype.itemsize == 2]
        + [sequences_kernel(torch.bfloat16), sequences_kernel(torch.float32)]
        + [
            chunk_fwd(D, *dtypes, saves).kernel
            for D, saves in ((64, False), (128, False), (128, True))
            for dtypes in CHUNK_FWD_DTYPES
            if arch == "sm_90a"
        ]
    )
