"""KDA on tensor cores: the kernels' launches, as custom ops with fakes and autograd. docs/kernels.md explains them.

Forward: `prepare.cu` (all chunks at once: everything that does not need the state), then `scan.cu` (chunk after chunk:
state and output). Backward: `reverse.cu` (chunk after chunk, backwards: the state's gradient), then `gradients.cu` (all
chunks at once). For the backward the forward keeps the packets, which only `reverse.cu` needs and which are freed
before the gradients are made; the state entering each chunk; and N~.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkda.ops.dispatch import goes_straight, straight, wants_gradient
from lkda.ops.jit import SHARED_BYTES_PER_BLOCK, Kernel, Module, architecture, multiprocessors
from lkda.ops.kda.segments import segment_count
from lkda.ops.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take, readable

HERE = Path(__file__).parent

LEAF = 8
WARPGROUPS = True  # where the scans may multiply by four warps at once (wgmma, sm_90a), they do
MOST_STAGES = 3  # chunks of the scan in shared memory: the one at work and those being fetched


reason_cannot_run = cannot_take(otherwise="chunk")


def _chunk(dtype: torch.dtype) -> int:
    """C, tokens of a chunk."""
    return 32 if dtype == torch.float32 else 64


def _packet_bytes(D: int, dtype: torch.dtype) -> int:
    C, size = _chunk(dtype), 4 if dtype == torch.float32 else 2
    return 3 * C * D * size + C * C * size + 4 * D + 4 * C


def _kept_state_bytes(D: int, dtype: torch.dtype) -> int:
    return 4 * D * D if dtype == torch.float32 else 2 * D * D + 128


class Layout:
    """Sizes of the kernels for heads of D and a dtype, as the .cu files compute them (and check at compile time).

    Attributes:
        chunk: C. Half-precision inputs are multiplied in bf16, float32 in tf32.
        packet, kept_state, columns: bytes of a Packet, of a Kept state and of [V, C] in the operands' type.
        threads: of the chunk-parallel kernels.   resident: blocks of `prepare` that a multiprocessor holds at most.
        warps: of the scans, 16 columns of V each.
    """

    def __init__(self, D: int, dtype: torch.dtype):
        wide = dtype == torch.float32
        self.D, self.item = D, dtype.itemsize
        self.chunk = C = _chunk(dtype)
        self.operand = size = 4 if wide else 2
        self.levels = 2 if wide else 3
        self.leaves = C // LEAF
        self.packet = _packet_bytes(D, dtype)
        self.kept_state = _kept_state_bytes(D, dtype)
        self.columns = D * C * size
        self.threads = D * self.leaves // 2
        self.resident = max(1, (384 if wide else 512) // self.threads)
        self.warps = min(4, D // 16)
        self.defines: dict[str, str | int | float] = {
            "HEAD_DIM": D,
            "CHUNK": C,
            "ELEMENT": ELEMENTS[dtype],
            "OPERAND": "tf32" if wide else "bfloat16",
        }
        self.merge = "tf32" if wide else "float16"

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
def _layout(D: int, dtype: torch.dtype) -> Layout:
    return Layout(D, dtype)


@cache
def _prepare_kernel(D: int, dtype: torch.dtype, arch: str) -> Kernel:
    layout = _layout(D, dtype)
    shared_bytes = layout.prepare_shared()
    defines = layout.defines | layout.room(shared_bytes, arch) | {"MERGE": layout.merge}
    module = Module(HERE / "prepare.cu", defines)
    module.companions = lambda: (
        _gradients_kernel(D, dtype, arch).module,
        *(_scan(name, D, dtype, arch, "whole").kernel.module for name in ("reverse", "scan")),
    )
    return module.kernel("kda_prepare", "PPPPPPiiif", shared_bytes=shared_bytes)


class Scan:
    """A scan over chunks: `scan` or `reverse`, of whole sequences or of segments, or the segments' `summary`.

    Attributes:
        warps: of a block, 16 columns each.
        blocks: of a head of a segment.
    """

    def __init__(self, name: str, D: int, dtype: torch.dtype, arch: str, part: str):
        layout = _layout(D, dtype)
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
            f"kda_{name}", "P" * (10 if name == "scan" else 9) + "iiii", shared_bytes=shared_bytes
        )

    def __call__(self, *tensors: Tensor | int | None, chunks: _Chunks, T: int, H: int, segments: int) -> None:
        self.kernel(
            (chunks.sequences * segments * H * self.blocks, 1, 1),
            32 * self.warps,
            *(*tensors, chunks.bounds, chunks.sequences, T, H, segments),
            device=chunks.device,
        )


@cache
def _scan(name: str, D: int, dtype: torch.dtype, arch: str, part: str) -> Scan:
    return Scan(name, D, dtype, arch, part)


def _parts(D: int) -> tuple[str, ...]:
    """Those of a scan with kernels of their own. Of a segment a block holds all columns, as of small heads anyway."""
    return ("whole", "summary") if D // 16 <= 4 else ("whole", "segment", "summary")


@cache
def _segments_kernel(D: int, arch: str) -> Kernel:
    sums = 4 * D * 8 + 4 * 8 * 8 * (D + 4)  # a state's eight columns, and partial sums of the next
    stage = 4 * D * 4 * (D // 16)  # four rows a warp
    stages = min(12, max(3, (SHARED_BYTES_PER_BLOCK[arch] // 2 - sums) // stage))  # room for two blocks, where it does
    shared_bytes = sums + stages * stage
    defines = _layout(D, torch.float32).defines | {"STAGES": stages, "SHARED_BYTES": shared_bytes}
    return Module(HERE / "segments.cu", defines).kernel("kda_segments", "PPPPiii", shared_bytes=shared_bytes)


@cache
def _gradients_kernel(D: int, dtype: torch.dtype, arch: str) -> Kernel:
    layout = _layout(D, dtype)
    roomy = SHARED_BYTES_PER_BLOCK[arch] >= layout.gradients_shared(True) * (2 if D < 128 else 1)
    shared_bytes = layout.gradients_shared(roomy)
    module = Module(HERE / "gradients.cu", layout.defines | layout.room(shared_bytes, arch) | {"ROOMY": int(roomy)})
    return module.kernel("kda_gradients", "PPPPPPPPPPPPPPPPPPiif", shared_bytes=shared_bytes)


@cache
def _sequences_kernel(dtype: torch.dtype) -> Kernel:
    return Module(HERE / "sequences.cu", _layout(64, dtype).defines).kernel("kda_sequences", "PPPii")


def kernels(arch: str) -> list[Kernel]:
    """Every kernel that runs on `arch`, for every head size and dtype."""
    variants = [(D, dtype) for D in HEAD_DIMS for dtype in ELEMENTS]
    chunked = [kernel(*variant, arch) for kernel in (_prepare_kernel, _gradients_kernel) for variant in variants]
    scans = [
        _scan(name, *variant, arch, part).kernel
        for name in ("scan", "reverse")
        for variant in variants
        for part in _parts(variant[0])
    ]
    return (
        chunked
        + scans
        + [_segments_kernel(D, arch) for D in HEAD_DIMS]
        + [_sequences_kernel(torch.bfloat16), _sequences_kernel(torch.float32)]
    )


class _Chunks:
    """The chunks of a batch: how many (at most, where cu_seqlens is on the device), and where they lie."""

    def __init__(self, q: Tensor, cu_seqlens: Tensor | None):
        B, T, _, D = q.shape
        C = _layout(D, q.dtype).chunk
        self.device = q.device
        self.bounds = self.spans = None
        if cu_seqlens is None:
            self.sequences, self.slots = B, B * -(-T // C)
            return
        self.sequences = N = cu_seqlens.shape[0] - 1
        self.slots = T // C + N
        self.bounds = torch.empty(2 * (N + 1), dtype=torch.int32, device=q.device)
        self.spans = torch.empty(self.slots, 4, dtype=torch.int32, device=q.device)
        launch = _sequences_kernel(torch.float32 if q.dtype == torch.float32 else torch.bfloat16)
        launch((1, 1, 1), 1024, cu_seqlens, self.bounds, self.spans, N, self.slots, device=q.device)


def _prepare(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, chunks: _Chunks, scale: float) -> Tensor:
    _, T, H, D = q.shape
    layout = _layout(D, q.dtype)
    packets = q.new_empty(chunks.slots * H * layout.packet, dtype=torch.uint8)
    launch = _prepare_kernel(D, q.dtype, architecture(q.device))
    items = chunks.slots * H
    arguments = (q, k, g, beta, packets, chunks.spans, items, T, H, scale)
    launch((min(items, multiprocessors(q.device) * layout.resident), 1, 1), layout.threads, *arguments, device=q.device)
    return packets


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """o, final_state, and where a backward follows (keep) packets and what `_Kept` lays out, else None and None."""
    _, T, H, D = q.shape
    q, k, v, g, beta = map(readable, (q, k, v, g, beta))
    chunks = _Chunks(q, cu_seqlens)
    packets = _prepare(q, k, g, beta, chunks, scale)
    o, final_state = _results(v, cu_seqlens)
    segments, arch = _segments(v, cu_seqlens), architecture(q.device)
    kept = _Kept(v, chunks.slots, _transition_bytes(v, cu_seqlens)) if keep else None
    states, corrections, transitions = kept.parts if kept else (None, None, None)
    where: dict[str, Any] = {"chunks": chunks, "T": T, "H": H, "segments": segments}
    enters: Tensor | int | None = initial_state
    if segments > 1:
        scratch = _Scratch(chunks.sequences * segments * H * D * D, q.device)
        offsets, transposed, enters = scratch.parts
        summary = _scan("scan", D, q.dtype, arch, "summary")
        summary(packets, v, None, None, offsets, None, None, transposed, transitions, **where)
        _enter_segments(D, transposed, offsets, initial_state, enters, backward=False, **where)
    scan = _scan("scan", D, q.dtype, arch, _part(D, segments))
    scan(packets, v, enters, o, final_state, states, corrections, None, None, **where)
    return o, final_state, packets if keep else None, kept.memory if kept else None


def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, ...]:
    """`_forward` as an op may be: an empty tensor in the place of every None."""
    results = _forward(q, k, v, g, beta, initial_state, cu_seqlens, scale, keep)
    return tuple(_nothing(v) if x is None else x for x in results)


def _nothing(v: Tensor) -> Tensor:
    return v.new_empty(0, dtype=torch.float32)


class _Scratch:
    """Three arrays of `numbers` float32 in one allocation, as addresses: one tensor's worth of host time."""

    def __init__(self, numbers: int, device: torch.device):
        self.memory = torch.empty(3 * numbers, dtype=torch.float32, device=device)
        start = self.memory.data_ptr()
        self.parts = (start, start + 4 * numbers, start + 8 * numbers)


def _enter_segments(
    D: int,
    matrices: Tensor | int | None,
    offsets: int,
    start: Tensor | None,
    entries: int,
    *,
    chunks: _Chunks,
    T: int,
    H: int,
    segments: int,
    backward: bool,
) -> None:
    """Writes the states [N * segments, H, K, V] that enter segments; backwards, gradients of those that leave them."""
    _segments_kernel(D, architecture(chunks.device))(
        (chunks.sequences * H * (D // 8), 1, 1),
        2 * D,
        *(matrices, offsets, start, entries, segments, H, int(backward)),
        device=chunks.device,
    )


def _segments(v: Tensor, cu_seqlens: Tensor | None) -> int:
    B, T, H, _ = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return segment_count(N, H, B * T // (_chunk(v.dtype) * N))


def _part(D: int, segments: int) -> str:
    return "segment" if segments > 1 and "segment" in _parts(D) else "whole"


def _results(v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """o and final_state, uninitialised."""
    B, _, H, D = v.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, v.new_empty((N, H, D, D), dtype=torch.float32)


def _slots(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Chunks at most: where cu_seqlens is on the device, nobody knows how many there are."""
    B, T, _, _ = v.shape
    C = _chunk(v.dtype)
    return B * ((T + C - 1) // C) if cu_seqlens is None else T // C + cu_seqlens.shape[0] - 1


class _Kept:
    """What a scan leaves for the backward, beside packets, in one allocation: host time is counted in allocations.

    Attributes:
        memory: uint8.
        parts: addresses of a state a chunk [slots, H] (Kept in kda_chunk.cuh: entering it; backwards dS1), of [slots,
            H, D, C] operands (N~; Y), and of `more` bytes (the segments' A; Y . v over 16 columns of V at a time).
    """

    def __init__(self, v: Tensor, slots: int, more: int = 0, memory: Tensor | None = None):
        _, _, H, D = v.shape
        layout = _layout(D, v.dtype)
        states, corrections = slots * H * layout.kept_state, slots * H * layout.columns
        if memory is None:
            memory = v.new_empty(states + corrections + more, dtype=torch.uint8)
        start = memory.data_ptr()
        self.memory = memory
        self.parts = (start, start + states, start + states + corrections)


def _fake_kept(v: Tensor, slots: int, more: int) -> Tensor:
    """`_Kept`'s memory, in arithmetic that takes symbolic sizes."""
    _, _, H, D = v.shape
    columns = D * _chunk(v.dtype) * (4 if v.dtype == torch.float32 else 2)
    return v.new_empty(slots * H * (_kept_state_bytes(D, v.dtype) + columns) + more, dtype=torch.uint8)


def _transition_bytes(v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Of the segments' A [N * segments, H, K, K] in float32, if there are segments."""
    B, _, H, D = v.shape
    segments, N = _segments(v, cu_seqlens), B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return N * segments * H * D * D * 4 if segments > 1 else 0


def _part_bytes(v: Tensor, slots: int) -> int:
    """Of Y . v [slots, H, D / 16, C] in float32."""
    _, _, H, D = v.shape
    return slots * H * (D // 16) * _chunk(v.dtype) * 4


def _reverse(
    grad_o: Tensor,
    grad_final: Tensor | None,
    v: Tensor,
    cu_seqlens: Tensor | None,
    packets: Tensor,
    kept: Tensor,
    wants_initial: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradient of the initial state where it is wanted, and what `_Kept` lays out."""
    _, T, H, D = v.shape
    v, grad_o = readable(v), readable(grad_o)
    grad_final = None if grad_final is None else readable(grad_final)
    chunks = _Chunks(v, cu_seqlens)
    d_initial = v.new_empty((chunks.sequences, H, D, D), dtype=torch.float32) if wants_initial else None
    outputs = _Kept(v, chunks.slots, _part_bytes(v, chunks.slots))
    segments, arch = _segments(v, cu_seqlens), architecture(v.device)
    where: dict[str, Any] = {"chunks": chunks, "T": T, "H": H, "segments": segments}
    leaves: Tensor | int | None = grad_final
    if segments > 1:
        scratch = _Scratch(chunks.sequences * segments * H * D * D, v.device)
        offsets, leaves, _ = scratch.parts
        summary = _scan("reverse", D, v.dtype, arch, "summary")
        summary(packets, None, grad_o, None, offsets, None, None, None, **where)
        transitions = _Kept(v, chunks.slots, memory=kept).parts[2]
        _enter_segments(D, transitions, offsets, grad_final, leaves, backward=True, **where)
    reverse = _scan("reverse", D, v.dtype, arch, _part(D, segments))
    reverse(packets, v, grad_o, leaves, d_initial, *outputs.parts, **where)
    return d_initial, outputs.memory


def _reverse_op(*inputs) -> tuple[Tensor, Tensor]:
    """`_reverse` as an op may be."""
    d_initial, d_kept = _reverse(*inputs)
    return _nothing(d_kept) if d_initial is None else d_initial, d_kept


def _chunk_gradients(
    grad_o: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    d_kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, T, H, D = q.shape
    q, k, g, beta, grad_o = map(readable, (q, k, g, beta, grad_o))
    grad_final = None if grad_final is None else readable(grad_final)
    chunks = _Chunks(q, cu_seqlens)
    grads = _gradients_of(q, g, beta)
    _gradients_kernel(D, q.dtype, architecture(q.device))(
        (chunks.slots * H, 1, 1),
        _layout(D, q.dtype).threads,
        *(
            q,
            k,
            g,
            beta,
            grad_o,
            *_Kept(q, chunks.slots, memory=kept).parts[:2],
            *_Kept(q, chunks.slots, memory=d_kept).parts,
        ),
        *(initial_state, grad_final, *grads, chunks.spans, T, H, scale),
        device=q.device,
    )
    return grads


def _gradients_of(q: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta, contiguous, uninitialised."""
    dq, dk, dv = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    return (
        dq,
        dk,
        dv,
        torch.empty_like(g, memory_format=torch.contiguous_format),
        torch.empty_like(beta, memory_format=torch.contiguous_format),
    )


_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(
    "kda_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens,"
    " float scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "kda_reverse(Tensor grad_o, Tensor? grad_final, Tensor v, Tensor? cu_seqlens, Tensor packets, Tensor kept,"
    " bool wants_initial) -> (Tensor, Tensor)"
)
_library.define(
    "kda_gradients(Tensor grad_o, Tensor? grad_final, Tensor q, Tensor k, Tensor g, Tensor beta, Tensor? initial_state,"
    " Tensor? cu_seqlens, Tensor kept, Tensor d_kept, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.impl("kda_forward", _forward_op, "CUDA")
_library.impl("kda_reverse", _reverse_op, "CUDA")
_library.impl("kda_gradients", _chunk_gradients, "CUDA")


@torch.library.register_fake("lkda::kda_forward", lib=_library)
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, keep):
    if not keep:
        return *_results(v, cu_seqlens), _nothing(v), _nothing(v)
    _, _, H, D = q.shape
    packets = v.new_empty(_slots(v, cu_seqlens) * H * _packet_bytes(D, q.dtype), dtype=torch.uint8)
    return *_results(v, cu_seqlens), packets, _fake_kept(v, _slots(v, cu_seqlens), _transition_bytes(v, cu_seqlens))


@torch.library.register_fake("lkda::kda_reverse", lib=_library)
def _(grad_o, grad_final, v, cu_seqlens, packets, kept, wants_initial):
    d_initial = _results(v, cu_seqlens)[1] if wants_initial else _nothing(kept)
    slots = _slots(v, cu_seqlens)
    return d_initial, _fake_kept(v, slots, _part_bytes(v, slots))


@torch.library.register_fake("lkda::kda_gradients", lib=_library)
def _(grad_o, grad_final, q, k, g, beta, *rest):
    return _gradients_of(q, g, beta)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, scale, keep = inputs
    if not keep:
        raise RuntimeError("lkda::kda_forward needs keep=True where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.scale = scale
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])


def _gradients(ctx, grad_o, grad_final, *grad_kept):
    q, k, v, g, beta, initial_state, cu_seqlens, packets, kept = ctx.saved_tensors
    ctx.maybe_clear_saved_tensors()  # unless the graph is kept: from here on only this function holds them
    if grad_o is None:
        grad_o = torch.zeros_like(q)
    straight = goes_straight(grad_o)
    reverse: Callable = _reverse if straight else torch.ops.lkda.kda_reverse
    gradients: Callable = _chunk_gradients if straight else torch.ops.lkda.kda_gradients
    wants_initial = initial_state is not None
    d_initial, d_kept = reverse(grad_o, grad_final, v, cu_seqlens, packets, kept, wants_initial)
    del packets  # their memory serves the gradients
    inputs = (q, k, g, beta, initial_state, cu_seqlens)
    grads = gradients(grad_o, grad_final, *inputs, kept, d_kept, ctx.scale)
    return *grads, d_initial if wants_initial else None, None, None, None


torch.library.register_autograd("lkda::kda_forward", _gradients, setup_context=_save, lib=_library)


_straight = straight(_forward, _save, _gradients, results=2)


def kda_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The chunked kernels, differentiable; arguments and results as in `kda_attention`.

    Raises: ValueError where K and V differ.
    """
    if k.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"kda_attention(backend='cuda'): K and V must be equal, got K = {k.shape[-1]} and V = {v.shape[-1]}; "
            "use backend='chunk'."
        )
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    inputs = (q, k, v, g, beta, initial_state)
    keep = wants_gradient(*inputs)
    forward: Callable = torch.ops.lkda.kda_forward
    if goes_straight(*inputs):
        forward = _straight if keep else _forward
    o, final_state, *_ = forward(q, k, v, g.float(), beta.float(), initial_state, cu_seqlens, scale, keep)
    return o, final_state
