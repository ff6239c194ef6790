"""Simplified linear attention on a GPU: launches of the kernels, as custom ops with fake implementations and autograd.

`forward.cu` and `backward.cu` are the tuned pair. They are parallel over chunks, and each tensor is read or written
once. Besides the inputs, the forward saves only the state that enters each chunk for the backward.
`baseline.cu` is a straightforward kernel to compare with, forward only. `step.cu` is one token of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.checks import InputError
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.jit import SHARED_BYTES_PER_BLOCK, Kernel, Module, architecture, fill_words, multiprocessors
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take

HERE = Path(__file__).parent

# As in scan.cuh.
THREADS, FAN_OUT = 256, 8
# Blocks per multiprocessor. More would find no work, and fewer would leave it idle.
BLOCKS = 2

_TENSOR = "(Pqqi)"  # address, and the strides of batch, head and token


reason_cannot_run = cannot_take(otherwise="chunk")


def _tokens(dtype: torch.dtype, *, backward: bool) -> int:
    """Tokens per thread and chunk. The tensors of a chunk, two in the forward and four in the backward, fill 32 KiB."""
    return (16 if backward else 32) // dtype.itemsize


def _chunk(head_dim: int, dtype: torch.dtype, *, backward: bool) -> int:
    """Tokens per chunk: those of a thread, times the number of strips of head_dim / 2 threads."""
    return _tokens(dtype, backward=backward) * 2 * THREADS // head_dim


def _stages(arch: str) -> int:
    """Chunks in shared memory at a time: 3 where they fit, so that a copy has a whole iteration to arrive; else 2."""
    return 3 if SHARED_BYTES_PER_BLOCK.get(arch, 0) >= 227 * 1024 else 2


def _shared_bytes(arch: str, head_dim: int, dtype: torch.dtype, packed: bool, *, backward: bool) -> int:
    """sizeof(Shared) of forward.cu or backward.cu. Every member is rounded up to 16 bytes."""
    strips = 2 * THREADS // head_dim
    chunk = _chunk(head_dim, dtype, backward=backward)
    exchange = 16 * THREADS + 8 * strips
    stage = 32 * 1024 + 4 * chunk + (4 * chunk if packed else 16)
    if not backward:
        return _stages(arch) * (stage + 32) + 3 * exchange + 48
    grad_decays = 8 * chunk if head_dim > 64 else 16
    return _stages(arch) * (stage + 8 * head_dim + 16) + 3 * exchange + grad_decays + 64


@cache
def scan_kernel(name: str, arch: str, head_dim: int, dtype: torch.dtype, packed: bool) -> Kernel:
    backward = name == "backward"
    shared_bytes = _shared_bytes(arch, head_dim, dtype, packed, backward=backward)
    defines: dict[str, str | int | float] = {
        "HEAD_DIM": head_dim,
        "ELEMENT": ELEMENTS[dtype],
        "TOKENS": _tokens(dtype, backward=backward),
        "PACKED": int(packed),
        "STAGES": _stages(arch),
        "SHARED_BYTES": shared_bytes,
    }
    arguments = _TENSOR * 5 + "PPPPPPPPPPiii" if backward else _TENSOR * 4 + "PPPPPPiii"
    return Module(HERE / f"{name}.cu", defines).kernel(f"simplified_{name}", arguments, shared_bytes=shared_bytes)


@cache
def baseline_kernel(head_dim: int, dtype: torch.dtype) -> Kernel:
    module = Module(HERE / "baseline.cu", {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype]})
    return module.kernel("simplified_baseline", _TENSOR * 4 + "PPPPii")


@cache
def step_kernel(head_dim: int, dtype: torch.dtype) -> Kernel:
    module = Module(HERE / "step.cu", {"HEAD_DIM": head_dim, "ELEMENT": ELEMENTS[dtype]})
    return module.kernel("simplified_step", "Pqq" * 4 + "PPPii")


@cache
def mark_kernel() -> Kernel:
    return Module(HERE / "sequences.cu", {}).kernel("simplified_mark", "PPiPPi")


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    variants = [(head_dim, dtype) for head_dim in HEAD_DIMS for dtype in ELEMENTS]
    scans = [
        (name, arch, *variant, packed)
        for name in ("forward", "backward")
        for variant in variants
        for packed in (False, True)
    ]
    each = [kernel(*variant) for kernel in (baseline_kernel, step_kernel) for variant in variants]
    return [scan_kernel(*scan) for scan in scans] + each + [mark_kernel()]


def _readable(x: Tensor) -> Tensor:
    """x if its rows are contiguous and aligned to 16 bytes, else a contiguous copy."""
    if x.data_ptr() % 16 == 0:
        if x.is_contiguous():
            return x
        *steps, last = x.stride()
        if last == 1 and all(step * x.element_size() % 16 == 0 for step in steps):
            return x
    return x.clone(memory_format=torch.contiguous_format)


def _strided(x: Tensor) -> tuple:
    """A tensor [B, T, H, ...] as kernel arguments: the tensor and its strides of batch, head and token."""
    batch, token, head = x.stride()[:3]
    return x, batch, head, token


class _Workspace:
    """The memory through which the blocks of one launch communicate: a counter of chunks, and published summaries.

    The layout is that of scan.cuh: 4 words; for each entry a state of 2 head_dim words; for each entry a decay of 2
    words; for packed rows the marks. All words start as -1. An entry is a chunk, a group of FAN_OUT chunks or a span of
    FAN_OUT groups.
    """

    def __init__(self, q: Tensor, cu_seqlens: Tensor | None, *, backward: bool):
        B, T, H, D = q.shape
        self.chunks = -(-T // _chunk(D, q.dtype, backward=backward))
        groups = -(-self.chunks // FAN_OUT)
        entries = B * H * (self.chunks + groups + -(-groups // FAN_OUT))
        words = 4 + entries * (2 * D + 2)
        size = words if cu_seqlens is None else words + T
        self.words = torch.empty(size, dtype=torch.int32, device=q.device)
        fill_words(self.words, -1)
        self.marks = None if cu_seqlens is None else self.words[words:]

    def mark(self, cu_seqlens: Tensor, through: Tensor | None, result: Tensor, T: int) -> None:
        """Marks where the packed sequences begin and end. Copies the rows of empty ones from `through` to `result`."""
        N = len(cu_seqlens) - 1
        words = result[0].numel()
        mark_kernel()((N, 1, 1), 1024, cu_seqlens, self.marks, T, through, result, words, device=cu_seqlens.device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    workspace = _Workspace(q, cu_seqlens, backward=False)
    o, final_state, entering = _forward_outputs(q, cu_seqlens, save)
    if cu_seqlens is not None:
        workspace.mark(cu_seqlens, initial_state, final_state, T)
    kernel = scan_kernel("forward", architecture(q.device), D, q.dtype, cu_seqlens is not None)
    blocks = min(B * H * workspace.chunks, BLOCKS * multiprocessors(q.device))
    kernel(
        (blocks, 1, 1),
        THREADS,
        *(*_strided(q), *_strided(k), *_strided(v), *_strided(decay)),
        *(initial_state, workspace.marks, workspace.words, o, final_state, entering if save else None),
        *(B, T, H),
        device=q.device,
    )
    return o, final_state, entering


def _forward_outputs(q: Tensor, cu_seqlens: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised o and final_state and, with `save`, the states that enter the backward's chunks
    [B, H, chunks, D / 2, 4]."""
    B, T, H, D = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = _chunk(D, q.dtype, backward=True)
    final_state = q.new_empty((N, H, 2, D), dtype=torch.float32)
    entering = final_state.new_empty((B, H, (T + chunk - 1) // chunk, D // 2, 4) if save else 0)
    return torch.empty_like(q, memory_format=torch.contiguous_format), final_state, entering


def _backward(
    grad_o: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    grad_o, q, k, v = _readable(grad_o), _readable(q), _readable(k), _readable(v)
    grad_final = None if grad_final is None else grad_final.contiguous()
    workspace = _Workspace(q, cu_seqlens, backward=True)
    grads = _backward_outputs(q, cu_seqlens)
    if cu_seqlens is not None:
        workspace.mark(cu_seqlens, grad_final, grads[4], T)
    kernel = scan_kernel("backward", architecture(q.device), D, q.dtype, cu_seqlens is not None)
    blocks = min(B * H * workspace.chunks, BLOCKS * multiprocessors(q.device))
    kernel(
        (blocks, 1, 1),
        THREADS,
        *(*_strided(q), *_strided(k), *_strided(v), *_strided(decay), *_strided(grad_o)),
        *(initial_state, grad_final, entering, workspace.marks, workspace.words, *grads),
        *(B, T, H),
        device=q.device,
    )
    return grads


def _backward_outputs(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients of q, k, v, decay and the initial state."""
    B, T, H, D = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_q, grad_k, grad_v = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    grad_decay = q.new_empty((B, T, H), dtype=torch.float32)
    return grad_q, grad_k, grad_v, grad_decay, grad_decay.new_empty((N, H, 2, D))


def _baseline(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    _, T, H, D = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    o, final_state, _ = _forward_outputs(q, cu_seqlens, False)
    baseline_kernel(D, q.dtype)(
        (final_state.shape[0] * H, 1, 1),
        D,
        *(*_strided(q), *_strided(k), *_strided(v), *_strided(decay)),
        *(initial_state, cu_seqlens, o, final_state, T, H),
        device=q.device,
    )
    return o, final_state


def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    B, H, D = q.shape
    q, k, v = _readable(q), _readable(k), _readable(v)
    o, new_state = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(state)
    arguments = [part for x in (q, k, v, decay) for part in (x, *x.stride()[:2])]
    blocks = (-(-B * H * D // 256), 1, 1)
    step_kernel(D, q.dtype)(blocks, 128, *arguments, state, o, new_state, B * H, H, device=q.device)
    return o, new_state


_QKV = "Tensor q, Tensor k, Tensor v, Tensor decay"
_REST = "Tensor? initial_state, Tensor? cu_seqlens"
_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(f"simplified_forward({_QKV}, {_REST}, bool save) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"simplified_backward(Tensor grad_o, Tensor? grad_final, {_QKV}, {_REST}, Tensor entering)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(f"simplified_baseline({_QKV}, {_REST}) -> (Tensor, Tensor)")
_library.define(f"simplified_step({_QKV}, Tensor state) -> (Tensor, Tensor)")
for _name, _function in (("forward", _forward), ("backward", _backward), ("baseline", _baseline), ("step", _step)):
    _library.impl(f"simplified_{_name}", _function, "CUDA")


@torch.library.register_fake("lkda::simplified_forward", lib=_library)
def _(q, k, v, decay, initial_state, cu_seqlens, save):
    return _forward_outputs(q, cu_seqlens, save)


@torch.library.register_fake("lkda::simplified_backward", lib=_library)
def _(grad_o, grad_final, q, k, v, decay, initial_state, cu_seqlens, entering):
    return _backward_outputs(q, cu_seqlens)


@torch.library.register_fake("lkda::simplified_baseline", lib=_library)
def _(q, k, v, decay, initial_state, cu_seqlens):
    return _forward_outputs(q, cu_seqlens, False)[:2]


@torch.library.register_fake("lkda::simplified_step", lib=_library)
def _(q, k, v, decay, state):
    return torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(state)


def _save(ctx, inputs, output):
    q, k, v, decay, initial_state, cu_seqlens, save = inputs
    if not save:
        raise RuntimeError("lkda::simplified_forward needs save=True where a gradient is wanted")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, decay, initial_state, cu_seqlens, output[2])


def _gradients(ctx, grad_o, grad_final, grad_entering):
    q, k, v, decay, initial_state, cu_seqlens, entering = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(q)
    backward = _backward if can_bypass_dispatcher(grad_o) else torch.ops.lkda.simplified_backward
    grads = backward(grad_o, grad_final, q, k, v, decay, initial_state, cu_seqlens, entering)
    return *grads[:4], grads[4] if initial_state is not None else None, None, None


torch.library.register_autograd("lkda::simplified_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(_forward, _save, _gradients, results=2)


def _as_kernel_inputs(decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None):
    """decay, initial_state and cu_seqlens in the dtypes that the kernels read."""
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    return decay.float(), initial_state, None if cu_seqlens is None else cu_seqlens.to(torch.int32)


def simplified_cuda(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tuned kernels, differentiable. Arguments as in `simplified_attention`, with decay [B, T, H]."""
    decay, initial_state, cu_seqlens = _as_kernel_inputs(decay, initial_state, cu_seqlens)
    inputs = (q, k, v, decay, initial_state)
    save = wants_gradient(*inputs)
    forward: Callable = torch.ops.lkda.simplified_forward
    if can_bypass_dispatcher(*inputs):
        forward = _with_autograd if save else _forward
    o, final_state, _ = forward(q, k, v, decay, initial_state, cu_seqlens, save)
    return o, final_state


def simplified_cuda_baseline(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The straightforward kernel, without gradients. Arguments as in `simplified_cuda`.

    Raises: ValueError if an input requires a gradient.
    """
    decay, initial_state, cu_seqlens = _as_kernel_inputs(decay, initial_state, cu_seqlens)
    inputs = (q, k, v, decay, initial_state)
    if wants_gradient(*inputs):
        raise InputError(
            "simplified_attention(backend='cuda_baseline') has no backward and an input requires a gradient; "
            "use backend='cuda', or call it under torch.no_grad()."
        )
    return torch.ops.lkda.simplified_baseline(q, k, v, decay, initial_state, cu_seqlens)


def simplified_step_cuda(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token in one kernel, without gradients. Arguments as in `simplified_step`, with a float32 state."""
    step = _step if can_bypass_dispatcher(q, k, v, decay, state) else torch.ops.lkda.simplified_step
    return step(q, k, v, decay.float().expand(q.shape[:2]), state.contiguous())
