"""Short convolutions on a GPU: launches of the kernels, as custom ops with fake implementations and autograd.

docs/dev/kernels_layer.md explains the kernels. Up to three tensors (q, k and v), here called streams, go through one
launch. They may lie side by side in one tensor, which is then x0; its gradient is one tensor too. Only the inputs are
saved for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.column_sums.cuda import column_sums
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.runtime.jit import Kernel, Module
from lkda.ops.runtime.kernel_inputs import ELEMENTS, HEAD_DIMS, cannot_take, readable

HERE = Path(__file__).parent

# As in short_conv.cuh.
MAX_TAPS, WARPS = 4, 8
CHANNELS = {"forward": 4, "backward": 4}  # per thread
RUN = {"forward": 64, "backward": 64}  # tokens per warp
AHEAD = {"forward": 4, "backward": 4}  # tokens that are being loaded while as many are computed on
RESIDENT = {"forward": 3, "backward": 2}  # blocks that a multiprocessor should hold at least


reason_cannot_run = cannot_take(otherwise="torch")


@cache
def conv_kernel(
    name: str, head_dim: int, dtype: torch.dtype, convolve: bool, result: torch.dtype | None = None
) -> Kernel:
    """The kernel `forward` or `backward`: of the convolution with the norm, or (convolve=False) of the norm alone.

    `result` is the dtype of y; None: that of x.
    """
    # Float32 inputs take more registers per thread. The norm alone has less to do and so needs fewer blocks.
    resident = RESIDENT[name] - 1 if dtype == torch.float32 or not convolve else RESIDENT[name]
    shape: dict[str, str | int | float] = {
        "HEAD_DIM": head_dim,
        "ELEMENT": ELEMENTS[dtype],
        "CONVOLVE": int(convolve),
        "CHANNELS": _channels(name, dtype),
    }
    shape |= {"RUN": RUN[name], "AHEAD": AHEAD[name], "RESIDENT": resident}
    if name == "forward":
        module = Module(HERE / "forward.cu", shape | {"RESULT": ELEMENTS[result or dtype]})
        return module.kernel("short_conv_forward", "P" * 16 + "qqiiiiii")
    module = Module(HERE / "backward.cu", shape)
    shared_bytes = 4 * MAX_TAPS * _channels(name, dtype) * 32 * WARPS if convolve else 0
    return module.kernel("short_conv_backward", "P" * 23 + "qqqiiiiiii", shared_bytes=shared_bytes)


def kernels(arch: str) -> list[Kernel]:
    """Every variant for `arch`: each head size and dtype."""
    return [
        conv_kernel(name, head_dim, dtype, convolve)
        for name in RUN
        for head_dim in HEAD_DIMS
        for dtype in ELEMENTS
        for convolve in (True, False)
    ] + [conv_kernel("forward", head_dim, torch.bfloat16, False, torch.float16) for head_dim in HEAD_DIMS]


def _channels(name: str, dtype: torch.dtype) -> int:
    """Channels per thread."""
    return min(CHANNELS[name], 16 // dtype.itemsize)


def _blocks(name: str, streams: int, x: Tensor) -> int:
    B, T, channels = x.shape
    return streams * B * _times(name, T) * -(-channels // (32 * _channels(name, x.dtype)))


def _times(name: str, T: int) -> int:
    """The number of blocks along time."""
    return -(-T // (WARPS * RUN[name]))


def _rows(xs: Sequence[Tensor]) -> list[Tensor]:
    """The tensors if they share one layout that the kernels can read, else contiguous copies."""
    steps = xs[0].stride()
    size = xs[0].element_size()
    fits = steps[2] == 1 and steps[0] * size % 16 == 0 and steps[1] * size % 16 == 0
    if fits and all(x.stride() == steps and x.data_ptr() % 16 == 0 for x in xs):
        return list(xs)
    return [readable(x) for x in xs]


def _streams(xs: Sequence[Tensor], count: int) -> list[Tensor]:
    """The tensors of the streams: the given ones, or the parts of one that has all of them side by side."""
    return list(xs[0].chunk(count, -1)) if len(xs) < count else list(xs)


def _count(xs: Sequence[Tensor | None], weights: Sequence[Tensor | None]) -> int:
    """The number of streams."""
    return max(len(_given(*xs)), len(_given(*weights)))


def _given(*xs: Tensor | None) -> list[Tensor]:
    return [x for x in xs if x is not None]


def _three(xs: Sequence[Tensor]) -> list[Tensor | None]:
    return [*xs, *(None for _ in range(3 - len(xs)))]


def launch_forward(
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    w0: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    cu_seqlens: Tensor | None,
    normalized: int,
    head_dim: int,
    result: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Three ys, of dtype `result` if that is given, and three last inputs. What does not exist is an empty tensor."""
    xs = _streams(_rows(_given(x0, x1, x2)), _count((x0, x1, x2), (w0, w1, w2)))
    B, T, C = xs[0].shape
    ys, lasts = forward_outputs(xs[0], w0, len(xs), cu_seqlens, result)
    kernel = conv_kernel("forward", head_dim, x0.dtype, w0 is not None, result)
    weights = (w if w is None else readable(w) for w in (w0, w1, w2))
    kernel(
        (_blocks("forward", len(xs), xs[0]), 1, 1),
        32 * WARPS,
        *(*_three(xs), *weights, s0, s1, s2, *_three(ys), *_three(lasts if w0 is not None else [])),
        *(cu_seqlens, *xs[0].stride()[:2], B, T, C, _sequences(x0, cu_seqlens), _width(w0), normalized),
        device=x0.device,
    )
    return _filled(ys, x0) + _filled(lasts, x0)


def _width(weight: Tensor | None) -> int:
    return 1 if weight is None else weight.shape[-1]


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _filled(xs: list[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """Three tensors: the given ones, then empty ones."""
    return tuple(xs) + tuple(like.new_empty(0) for _ in range(3 - len(xs)))


def forward_outputs(
    x: Tensor,
    weight: Tensor | None,
    streams: int,
    cu_seqlens: Tensor | None,
    result: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised y [B, T, C] and last inputs [B or N, width - 1, C] (float32) of each stream."""
    B, T, C = x.shape
    ys = [torch.empty((B, T, C), dtype=result or x.dtype, device=x.device) for _ in range(streams)]
    if weight is None:
        return ys, []
    shape = (_sequences(x, cu_seqlens), weight.shape[-1] - 1, C)
    return ys, [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(streams)]


def launch_backward(
    g0: Tensor,
    g1: Tensor | None,
    g2: Tensor | None,
    e0: Tensor | None,
    e1: Tensor | None,
    e2: Tensor | None,
    x0: Tensor,
    x1: Tensor | None,
    x2: Tensor | None,
    w0: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    s0: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    cu_seqlens: Tensor | None,
    normalized: int,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Gradients of three xs, three states, and the weights [streams, C, 1, width]. What does not exist is empty."""
    given, gradients = _rows(_given(x0, x1, x2)), [readable(g) for g in _given(g0, g1, g2)]
    xs = _streams(given, len(gradients))
    B, T, C = xs[0].shape
    dgiven, dstates = _backward_outputs(given, len(xs), s0)
    dxs = _streams(dgiven, len(xs))
    rows = B * _times("backward", T)
    size = rows * len(xs) * C * _width(w0) if w0 is not None else 0
    partials = torch.empty(size, dtype=torch.float32, device=x0.device)
    kernel = conv_kernel("backward", head_dim, x0.dtype, w0 is not None)
    weights = (w if w is None else readable(w) for w in (w0, w1, w2))
    lasts = (e if e is None else readable(e) for e in (e0, e1, e2))
    kernel(
        (_blocks("backward", len(xs), xs[0]), 1, 1),
        32 * WARPS,
        *(*_three(xs), *_three(gradients), *weights, s0, s1, s2, *lasts, *_three(dxs), *_three(dstates), partials),
        *(cu_seqlens, *xs[0].stride()[:2], dxs[0].stride(1)),
        *(B, T, C, _sequences(x0, cu_seqlens), _width(w0), normalized, len(xs)),
        device=x0.device,
    )
    dweights = partials if w0 is None else column_sums(partials.view(rows, -1)).view(len(xs), *w0.shape)
    return *_filled(dgiven, x0), *_filled(dstates, x0), dweights


def _backward_outputs(xs: Sequence[Tensor], streams: int, state: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised gradients, contiguous: one per given x, and one per stream of its state."""
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]
    if state is None:
        return dxs, []
    return dxs, [torch.empty(state.shape, dtype=state.dtype, device=state.device) for _ in range(streams)]


_THREE = "Tensor {0}0, Tensor? {0}1, Tensor? {0}2, "
_ANY = "Tensor? {0}0, Tensor? {0}1, Tensor? {0}2, "
_INPUTS = _THREE.format("x") + _ANY.format("w") + _ANY.format("s") + "Tensor? cu_seqlens, int normalized, int head_dim"
_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(f"short_conv_forward({_INPUTS}) -> ({', '.join(['Tensor'] * 6)})")
_library.define(
    f"short_conv_backward({_THREE.format('g')}{_ANY.format('e')}{_INPUTS}) -> ({', '.join(['Tensor'] * 7)})"
)
_library.impl("short_conv_forward", launch_forward, "CUDA")
_library.impl("short_conv_backward", launch_backward, "CUDA")


@torch.library.register_fake("lkda::short_conv_forward", lib=_library)
def _(x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized, head_dim):
    streams = _count((x0, x1, x2), (w0, w1, w2))
    x = _streams(_given(x0, x1, x2), streams)[0]
    ys, lasts = forward_outputs(x, w0, streams, cu_seqlens)
    return _filled(ys, x0) + _filled(lasts, x0)


@torch.library.register_fake("lkda::short_conv_backward", lib=_library)
def _(g0, g1, g2, e0, e1, e2, x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized, head_dim):
    streams = len(_given(g0, g1, g2))
    dxs, dstates = _backward_outputs(_given(x0, x1, x2), streams, s0)
    shape = (0,) if w0 is None else (streams, *w0.shape)
    dweights = torch.empty(shape, dtype=torch.float32, device=x0.device)
    return *_filled(dxs, x0), *_filled(dstates, x0), dweights


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, ctx.normalized, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, g0, g1, g2, e0, e1, e2):
    saved = ctx.saved_tensors  # once: activation checkpointing allows no second reading
    x0, x1, x2, w0, w1, w2, *states, _ = saved
    streams = _count((x0, x1, x2), (w0, w1, w2))
    x = _streams(_given(x0, x1, x2), streams)[0]
    gradients = [x.new_zeros(x.shape) if g is None else g for g in (g0, g1, g2)[:streams]]
    lasts = [e if w0 is not None and i < streams else None for i, e in enumerate((e0, e1, e2))]
    backward: Callable = launch_backward if can_bypass_dispatcher(*gradients) else torch.ops.lkda.short_conv_backward
    *found, dweights = backward(*_three(gradients), *lasts, *saved, ctx.normalized, ctx.head_dim)
    weights = _three(list(dweights.unbind(0)) if w0 is not None else [])
    dxs, dstates = found[:3], found[3:]
    return (
        *(d if x is not None else None for d, x in zip(dxs, (x0, x1, x2))),
        *weights,
        *(d if s is not None else None for d, s in zip(dstates, states)),
        *(None, None, None),
    )


torch.library.register_autograd("lkda::short_conv_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(launch_forward, _save, _gradients)


def short_convolutions_cuda(
    xs: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor] | None,
    normalized: Sequence[bool],
    head_dim: int,
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The kernels, differentiable. Arguments and results as in `short_convolutions`; without weights the norm alone."""
    filters = [] if weights is None else [w.float() for w in weights]
    before = [] if states is None else [s.float().contiguous() for s in states]
    cu_seqlens = _bounds(cu_seqlens)
    bits = sum(1 << i for i, word in enumerate(normalized) if word)
    size = head_dim if bits else HEAD_DIMS[0]
    tensors = (*_three([xs] if isinstance(xs, Tensor) else xs), *_three(filters), *_three(before))
    forward: Callable = torch.ops.lkda.short_conv_forward
    if can_bypass_dispatcher(*tensors):
        save = wants_gradient(*tensors)
        forward = _with_autograd if save else launch_forward
    found = forward(*tensors, cu_seqlens, bits, size)
    ys, lasts = found[: len(normalized)], found[3 : 3 + len(filters)]
    dtypes = [] if weights is None else [x.dtype for x in (weights if states is None else states)]
    return tuple(ys), tuple(last.to(dtype) for last, dtype in zip(lasts, dtypes))


def convolve(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """y [B, T, C] of the convolution of x with weight [C, 1, width], which begins with zeros.

    Autograd does not record it; `convolve_backward` computes the gradients. The arguments are not checked.
    """
    nothing = (None,) * 5
    return launch_forward(x, None, None, weight.float(), *nothing, _bounds(cu_seqlens), 0, HEAD_DIMS[0])[0]


def convolve_backward(dy: Tensor, x: Tensor, weight: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in float32, weight of `convolve`."""
    inputs = (x, None, None, weight.float(), None, None, None, None, None, _bounds(cu_seqlens))
    dx, *_, dweights = launch_backward(dy, None, None, None, None, None, *inputs, 0, HEAD_DIMS[0])
    return dx, dweights[0]


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()


_BOTH = 0b11  # q and k


def normalized_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what `normalize_heads` returns: float16 for half precision.

    The numbers are at most 1, and float16 keeps 3 bits more of them than bfloat16.
    """
    return torch.float16 if dtype.itemsize == 2 else dtype


def normalize_heads(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, T, H, D] divided by their L2 norms, in one launch; contiguous, of `normalized_dtype`.

    Autograd does not record it; `normalize_heads_backward` computes the gradients.
    """
    x0, x1, D = q.flatten(2), k.flatten(2), q.shape[-1]
    nothing = (None,) * 6  # neither filters nor states
    ys = launch_forward(x0, x1, None, *nothing, None, _BOTH, D, normalized_dtype(q.dtype))
    return ys[0].view(q.shape), ys[1].view(k.shape)


def normalize_heads_backward(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, in their dtype, from those of the normalised q and k."""
    backward: Callable = launch_backward if can_bypass_dispatcher(dq, dk) else torch.ops.lkda.short_conv_backward
    given, xs = (dq.flatten(2), dk.flatten(2), None), (q.flatten(2), k.flatten(2), None)
    nothing = (None,) * 6
    found = backward(*given, None, None, None, *xs, *nothing, None, _BOTH, q.shape[-1])
    return found[0].view(q.shape), found[1].view(k.shape)
