"""What a batch of one shape asks of the chunked kernels: sizes of what passes between them, and their launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from lkda.ops.kda.cuda.segments import segment_count
from lkda.ops.kda.cuda.variants import (
    Scan,
    chunk_of,
    gradients_kernel,
    kept_state_bytes,
    largest_kernel,
    layout_of,
    packet_bytes,
    parts_of,
    prepare_kernel,
    scan_of,
    segments_kernel,
    sequences_kernel,
)
from lkda.ops.runtime.jit import architecture, multiprocessors

Launch = Callable[..., None]


class Sizes:
    """Sizes, in arithmetic that takes symbolic ones.

    Attributes:
        sequences: N.   segments: of each of them.
        slots: chunks at most: where cu_seqlens is on the device, nobody knows how many there are.
        largest: bytes of the largest |v| of every chunk and head, or |dO|, in float32.
        packets: bytes of all packets, and after them of those of v.
        states, corrections, transitions, units: bytes of what a forward keeps: the state entering each chunk (Kept in
            kda_chunk.cuh), N~ [slots, H, D, C] in the operands' type, the segments' A [N * segments, H, K, K], and the
            units of v [N, H] (kda_unit.cuh), both in float32.
        products: bytes of what `reverse` leaves in the place of A: Y . v over 16 columns of V at a time, [slots, H,
            D / 16, C] in float32. Before it lie dS1 and Y, of the sizes of states and corrections; after it dO's
            units and the largest |dO|.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, N: int | None, segments: int):
        B, T, H, D = shape
        C, operand = chunk_of(dtype), 4 if dtype == torch.float32 else 2
        self.sequences, self.segments = B if N is None else N, segments
        self.slots = B * ((T + C - 1) // C) if N is None else T // C + N
        items = self.slots * H
        self.largest = 4 * items if dtype.itemsize == 2 else 0
        self.packets = items * packet_bytes(D, dtype) + self.largest
        self.states, self.corrections = items * kept_state_bytes(D, dtype), items * D * C * operand
        self.units = 4 * self.sequences * H if dtype.itemsize == 2 else 0
        self.transitions = self.sequences * segments * H * D * D * 4 if segments > 1 else 0
        self.products = items * (D // 16) * C * 4
        both = self.states + self.corrections + self.units
        self.kept, self.d_kept = both + self.transitions, both + self.products + self.largest

    def kept_parts(self, memory: Tensor) -> tuple[int, int, int, int]:
        """Addresses of states, corrections, transitions and units in what a forward keeps: one allocation, as host time
        is counted in them."""
        return self._parts(memory, self.transitions)

    def d_kept_parts(self, memory: Tensor) -> tuple[int, int, int, int]:
        """Addresses of dS1, Y, products and dO's units in what `reverse` leaves."""
        return self._parts(memory, self.products)

    def _parts(self, memory: Tensor, third: int) -> tuple[int, int, int, int]:
        start = memory.data_ptr()
        states, both = start + self.states, start + self.states + self.corrections
        return start, states, both, both + third

    def largest_in(self, memory: Tensor) -> int:
        """Address of the largest numbers at the end of what `packets` or `d_kept` counts."""
        return memory.data_ptr() + memory.shape[0] - self.largest


class Plan(Sizes):
    """Sizes, and launches on a device: functions of a kernel's arguments alone. q and k are of dtype `query`."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        N: int | None,
        segments: int,
        device: torch.device,
        query: torch.dtype,
    ):
        super().__init__(shape, dtype, N, segments)
        _, _, H, D = shape
        self.device = device
        self.items, layout, arch = self.slots * H, layout_of(D, dtype), architecture(device)
        self.state_numbers = self.sequences * segments * H * D * D

        def launch(kernel: Callable[..., None], blocks: int, threads: int) -> Launch:
            return partial(kernel, (blocks, 1, 1), threads, device=device)

        def scan(name: str, part: str) -> Launch:
            variant: Scan = scan_of(name, D, dtype, arch, part)
            return launch(variant.kernel, self.sequences * segments * H * variant.blocks, 32 * variant.warps)

        part = "segment" if segments > 1 and "segment" in parts_of(D) else "whole"
        resident_blocks = min(self.items, multiprocessors(device) * layout.resident)
        self.prepare = launch(prepare_kernel(D, dtype, arch, query), resident_blocks, layout.threads)
        self.scan, self.reverse = scan("scan", part), scan("reverse", part)
        self.summarize, self.summarize_reverse = scan("scan", "summary"), scan("reverse", "summary")
        self.enter_segments = launch(segments_kernel(D, arch), self.sequences * H * (D // 8), 2 * D)
        self.gradients = launch(gradients_kernel(D, dtype, arch, query), self.items, layout.threads)
        self._largest: Launch | None = None
        if dtype.itemsize == 2:
            self._largest = launch(largest_kernel(D, dtype), -(-self.items // 8), 256)
        self._sequences = launch(sequences_kernel(torch.float32 if layout.operand == 4 else torch.bfloat16), 1, 1024)

    def find_largest(self, x: Tensor, spans: Tensor | None, memory: Tensor) -> int:
        """The largest |x| of every chunk and head, to the end of `memory`; its address. Float32 has no use for them."""
        _, T, H, _ = x.shape
        if self._largest is not None:
            self._largest(x, self.largest_in(memory), spans, self.items, T, H)
        return self.largest_in(memory)

    def chunks(self, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Of packed sequences: first chunks and bounds of sequences, and where each chunk lies; else None."""
        if cu_seqlens is None:
            return None, None
        N = self.sequences
        bounds = torch.empty(2 * (N + 1), dtype=torch.int32, device=self.device)
        spans = torch.empty(self.slots, 4, dtype=torch.int32, device=self.device)
        self._sequences(cu_seqlens, bounds, spans, N, self.slots)
        return bounds, spans


def sizes_of(x: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    """Of the batch that x (v or its like) belongs to; for fake tensors too."""
    N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Sizes(x.shape, x.dtype, N, _segments(x, N))


def plan_of(x: Tensor, cu_seqlens: Tensor | None, query: torch.dtype | None = None) -> Plan:
    """Of the batch that x (v or its like) belongs to, on its device; where it matters with q and k of dtype `query`."""
    N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _plan(x.shape, x.dtype, N, _segments(x, N), x.device, query or x.dtype)


_plan = lru_cache(maxsize=1024)(Plan)


def _segments(x: Tensor, N: int | None) -> int:
    B, T, H, _ = x.shape
    sequences = B if N is None else N
    return segment_count(sequences, H, B * T // (chunk_of(x.dtype) * sequences))
