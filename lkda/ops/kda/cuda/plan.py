"""For a batch of one shape: the sizes of what the chunked kernels pass to each other, and the launches of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from lkda.ops.kda.cuda.segments import BLOCKS, optional_segment_count, segment_count
from lkda.ops.kda.cuda.variants import (
    InterChunkKernel,
    amax_kernel,
    chunk_fwd,
    chunk_of,
    has_chunk_fwd,
    inter_chunk_kernel,
    intra_chunk_bwd,
    intra_chunk_fwd,
    layout_of,
    parts_of,
    saved_state_bytes,
    segments_kernel,
    sequences_kernel,
    workspace_bytes,
)
from lkda.ops.runtime.jit import architecture, multiprocessors

Launch = Callable[..., None]


class Sizes:
    """Sizes in bytes of what the kernels pass to each other. The arithmetic works on symbolic sizes too.

    "The operands' type" is what the tensor cores multiply: float16, or tf32 (4 bytes) for float32 inputs.

    Attributes:
        sequences: N, the number of sequences.
        segments: the number of segments of each sequence.
        optional: whether the segments are (segments.py).
        slots: an upper bound of the number of chunks, which itself is known only on the device, where cu_seqlens is.
        amax: the largest |v| (or |do|) of each chunk and head, [slots, H] float32. 0 for float32 inputs.
        workspaces: a ChunkWorkspace (kda_chunk.cuh) per chunk and head, [slots, H]; after them the amax of v.
        saved: what the forward saves for the backward, in this order:
            states: h, the state that enters each chunk, [slots, H] SavedState (kda_chunk.cuh).
            v_tilde: v~^T, [slots, H, D, C] in the operands' type.
            transitions: A of the segments, [N, segments, H, K, K] float32.
            scales: the power-of-two scale of v (kda_scale.cuh), [N, H] float32.
        d_saved: what inter_chunk_bwd leaves for intra_chunk_bwd, in this order:
            dh', the gradient of the state that leaves each chunk, laid out as `states`.
            Y^T, laid out as `v_tilde`.
            beta_parts: Y . v over 16 columns of V at a time, [slots, H, D / 16, C] float32.
            the power-of-two scale of do, laid out as `scales`; then the amax of do.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, N: int | None, segments: int, optional: bool):
        B, T, H, D = shape
        C, operand = chunk_of(dtype), 4 if dtype == torch.float32 else 2
        self.sequences, self.segments, self.optional = B if N is None else N, segments, optional
        self.slots = B * ((T + C - 1) // C) if N is None else T // C + N
        items = self.slots * H
        self.amax = 4 * items if dtype.itemsize == 2 else 0
        self.workspaces = items * workspace_bytes(D, dtype) + self.amax
        self.states, self.v_tilde = items * saved_state_bytes(D, dtype), items * D * C * operand
        self.scales = 4 * self.sequences * H if dtype.itemsize == 2 else 0
        self.transitions = self.sequences * segments * H * D * D * 4 if segments > 1 and not optional else 0
        self.beta_parts = items * (D // 16) * C * 4
        both = self.states + self.v_tilde + self.scales
        self.saved, self.d_saved = both + self.transitions, both + self.beta_parts + self.amax

    def saved_parts(self, memory: Tensor) -> tuple[int, int, int, int]:
        """Addresses of states, v_tilde, transitions and scales in `memory`, the one allocation of what is saved.

        It is one allocation because each of them costs host time.
        """
        return self._parts(memory, self.transitions)

    def d_saved_parts(self, memory: Tensor) -> tuple[int, int, int, int]:
        """Addresses of dh', Y, beta_parts and the scales of do in what inter_chunk_bwd leaves."""
        return self._parts(memory, self.beta_parts)

    def _parts(self, memory: Tensor, third: int) -> tuple[int, int, int, int]:
        start = memory.data_ptr()
        states, both = start + self.states, start + self.states + self.v_tilde
        return start, states, both, both + third

    def amax_in(self, memory: Tensor) -> int:
        """Address of the amax, which lies at the end of the memory that `workspaces` or `d_saved` counts."""
        return memory.data_ptr() + memory.shape[0] - self.amax


class Plan(Sizes):
    """Sizes, and a launch for each kernel on a device: a function of the kernel's arguments alone.

    Args:
        shape, dtype: of v, [B, T, H, D].
        N: the number of packed sequences; None where each row of the batch is one.
        query: the dtype of q and k.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        N: int | None,
        segments: int,
        optional: bool,
        device: torch.device,
        query: torch.dtype,
    ):
        super().__init__(shape, dtype, N, segments, optional)
        _, _, H, D = shape
        self.device = device
        self.items, layout, arch = self.slots * H, layout_of(D, dtype), architecture(device)
        self.state_numbers = self.sequences * segments * H * D * D

        def launch(kernel: Callable[..., None], blocks: int, threads: int) -> Launch:
            return partial(kernel, (blocks, 1, 1), threads, device=device)

        def scan(name: str, part: str) -> Launch:
            variant: InterChunkKernel = inter_chunk_kernel(name, D, dtype, arch, part)
            return launch(variant.kernel, self.sequences * segments * H * variant.blocks, 32 * variant.warps)

        part = "segment" if segments > 1 and "segment" in parts_of(D) else "whole"
        resident_blocks = min(self.items, multiprocessors(device) * layout.resident)
        intra_chunk = intra_chunk_fwd(D, dtype, arch, query)
        self._intra_chunk_fwd = launch(intra_chunk.kernel, resident_blocks, intra_chunk.threads)
        self._finds_amax_of_v = intra_chunk.helpers
        self.inter_chunk_fwd, self.inter_chunk_bwd = scan("inter_chunk_fwd", part), scan("inter_chunk_bwd", part)
        self.summarize_fwd, self.summarize_bwd = scan("inter_chunk_fwd", "summary"), scan("inter_chunk_bwd", "summary")
        self.chunk_fwd: Launch | None = None
        """The whole forward in one kernel, for a forward that no backward follows. None where the other kernels run."""
        self.chunk_fwd_saves: Launch | None = None
        """The same for a forward that a backward follows."""
        uncut = N is None and segments == 1
        if has_chunk_fwd(D, dtype, arch) and uncut:
            one_pass = chunk_fwd(D, dtype, query)
            blocks = self.sequences * H * one_pass.blocks
            if fills_in_one_pass(blocks):
                self.chunk_fwd = launch(one_pass.kernel, blocks, one_pass.threads)
            if D == 128 and fills_in_one_pass(blocks, saves=True):
                saving = chunk_fwd(D, dtype, query, saves=True).kernel
                self.chunk_fwd_saves = launch(saving, blocks, one_pass.threads)
        self.segment_entries = launch(segments_kernel(D, arch), self.sequences * H * (D // 8), 2 * D)
        backward = intra_chunk_bwd(D, dtype, arch, query)
        backward_blocks = min(self.items, multiprocessors(device)) if backward.persistent else self.items
        self.intra_chunk_bwd = launch(backward.kernel, backward_blocks, layout.threads)
        self._amax: Launch | None = None
        if dtype.itemsize == 2:
            self._amax = launch(amax_kernel(D, dtype), -(-self.items // 8), 256)
        self._sequences = launch(sequences_kernel(torch.float32 if layout.operand == 4 else torch.bfloat16), 1, 1024)

    def intra_chunk_fwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        workspaces: Tensor,
        spans: Tensor | None,
        scale: float,
    ) -> None:
        """Writes the workspaces, and the largest |v| of each chunk and head to the end of their memory."""
        _, T, H, _ = v.shape
        shape = (spans, self.items, T, H, scale)
        if self._finds_amax_of_v:
            self._intra_chunk_fwd(q, k, v, g, beta, workspaces, self.amax_in(workspaces), *shape)
        else:
            self._intra_chunk_fwd(q, k, g, beta, workspaces, *shape)
            self.find_amax(v, spans, workspaces)

    def find_amax(self, x: Tensor, spans: Tensor | None, memory: Tensor) -> int:
        """Writes the largest |x| of each chunk and head to the end of `memory` and returns its address.

        Float32 inputs need none, so nothing is launched for them.
        """
        _, T, H, _ = x.shape
        if self._amax is not None:
            self._amax(x, self.amax_in(memory), spans, self.items, T, H)
        return self.amax_in(memory)

    def chunks(self, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """For packed sequences: bounds [2 (N + 1)] and spans [slots, 4], as sequences.cu describes them. Else Nones."""
        if cu_seqlens is None:
            return None, None
        N = self.sequences
        bounds = torch.empty(2 * (N + 1), dtype=torch.int32, device=self.device)
        spans = torch.empty(self.slots, 4, dtype=torch.int32, device=self.device)
        self._sequences(cu_seqlens, bounds, spans, N, self.slots)
        return bounds, spans


def fills_in_one_pass(blocks: int, saves: bool = False) -> bool:
    """Whether so many blocks of chunk_fwd.cu, one for each head of a sequence, or of chunk_fwd_pair.cu, two for each,
    keep the GPU busy until the last ends. `saves`: whether a backward follows.

    A multiprocessor holds one block, so the blocks run in turns of BLOCKS, and at least two thirds of the places must
    be taken, three quarters for a kernel that saves. With fewer the other kernels are as fast. Packed sequences do not
    get this kernel at all: the longest may be much longer than the others, and its block would run alone.
    """
    turns = -(-blocks // BLOCKS)
    return blocks >= (3 / 4 if saves else 2 / 3) * turns * BLOCKS


def sizes_of(x: Tensor, cu_seqlens: Tensor | None) -> Sizes:
    """The sizes for the batch of x, which is v or shaped like it. x may be a fake tensor."""
    N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return Sizes(x.shape, x.dtype, N, *_segments(x, N))


def plan_of(x: Tensor, cu_seqlens: Tensor | None, query: torch.dtype | None = None) -> Plan:
    """The plan for the batch of x, which is v or shaped like it, on its device. q and k are of dtype `query`, or of x's
    dtype where that is None."""
    N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return _plan(x.shape, x.dtype, N, *_segments(x, N), x.device, query or x.dtype)


_plan = lru_cache(maxsize=1024)(Plan)


def _segments(x: Tensor, N: int | None) -> tuple[int, bool]:
    """How many segments, and whether they are optional."""
    B, T, H, D = x.shape
    sequences = B if N is None else N
    chunks = B * T // (chunk_of(x.dtype) * sequences)
    count = segment_count(sequences, H, chunks)
    if count > 1 or x.dtype.itemsize == 4:  # chunks of float32 inputs are not tested
        return count, False
    count = optional_segment_count(sequences, H, chunks, D)
    return count, count > 1
