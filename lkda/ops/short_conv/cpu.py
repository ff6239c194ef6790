"""Short convolutions on a CPU: calls of convolution.cpp, as custom ops with fake implementations and autograd.

Up to three tensors (q, k and v), here called streams, go through one op. Only the inputs are saved for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lkda.ops.recurrence import compute_dtype
from lkda.ops.runtime.cpp import NAMES, Library, cpu_only
from lkda.ops.runtime.dispatch import can_bypass_dispatcher, wants_gradient, without_dispatcher
from lkda.ops.sequences import bounds_of
from lkda.ops.short_conv.reference import normalize_torch

LIBRARY = Library(Path(__file__).with_name("convolution.cpp"))
STREAMS = 3

reason_cannot_run = cpu_only(LIBRARY, otherwise="torch")

Optional3 = tuple[Tensor | None, Tensor | None, Tensor | None]


def _readable(x: Tensor) -> Tensor:
    """x [B, T, channels] if its rows lie at one distance from each other, else a copy of which that is true."""
    rows = x.shape[0] == 1 or x.stride(0) == x.shape[1] * _distance(x)
    return x if rows and x.stride(2) == 1 else x.contiguous()


def _distance(x: Tensor) -> int:
    """From row to row of x [B, T, channels]. The stride of an axis of length 1 can be any number."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _streams(
    xs: Sequence[Tensor | None], weights: Sequence[Tensor | None], states: Sequence[Tensor | None]
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """The number, the input, the filters [width, channels] and the state before it of each stream."""
    count = sum(weight is not None for weight in weights)
    joined = xs[0] is not None and xs[1] is None and count > 1  # one tensor with the channels of all streams
    inputs = xs[0].chunk(count, -1) if joined and xs[0] is not None else xs
    for i, (x, weight, state) in enumerate(zip(inputs, weights, states)):
        if x is not None and weight is not None:
            yield i, x, weight[:, 0].t().contiguous(), None if state is None else state.contiguous()


def _sizes(x: Tensor, taps: Tensor, cu_seqlens: Tensor | None, head: int) -> tuple[Tensor, int, int, int, int, int]:
    """The first arguments of both functions of the .cpp file."""
    B, T, channels = x.shape
    bounds = bounds_of(B, T, cu_seqlens)
    return bounds, len(bounds) - 1, channels, taps.shape[0], head, _distance(x)


def _results(x: Tensor, width: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uninitialised y, and the last inputs of each sequence."""
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(N, width - 1, x.shape[2])


def _six(x: Tensor, ys: list[Tensor], lasts: list[Tensor]) -> tuple[Tensor, ...]:
    """Three outputs and three last inputs: an empty tensor for a stream that does not exist."""
    missing = [x.new_empty(0) for _ in range(STREAMS - len(ys))]
    return (*ys, *missing, *lasts, *(m.clone() for m in missing))


def _forward(x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized: int, head: int) -> tuple[Tensor, ...]:
    """y and the last inputs of each stream. Bit i of `normalized`: whether stream i is normalised."""
    ys, lasts = [], []
    for i, x, taps, state in _streams((x0, x1, x2), (w0, w1, w2), (s0, s1, s2)):
        x = _readable(x)
        y, last = _results(x, len(taps), cu_seqlens)
        inputs = (*_sizes(x, taps, cu_seqlens, head), x, taps, state, normalized >> i & 1)
        LIBRARY.call(f"convolution_forward_{NAMES[x.dtype]}", *inputs, y, last, torch.get_num_threads())
        ys.append(y)
        lasts.append(last)
    return _six(x0, ys, lasts)


def _backward(
    dy0, dy1, dy2, dl0, dl1, dl2, x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized: int, head: int
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and state of each stream; an empty tensor for what does not exist."""
    inputs = [None if x is None else _readable(x) for x in (x0, x1, x2)]
    dxs = [x0.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]
    into = dict(enumerate(dxs))
    grads = [x0.new_empty(0) for _ in range(6)]
    dys, dlasts = (dy0, dy1, dy2), (dl0, dl1, dl2)
    if x1 is None and w1 is not None:
        into = dict(enumerate(dxs[0].chunk(2 if w2 is None else 3, -1)))
    for i, x, taps, state in _streams(inputs, (w0, w1, w2), (s0, s1, s2)):
        dx, dlast = into[i], dlasts[i]
        if _distance(dx) != _distance(x):
            x = x.contiguous()
        dy = torch.zeros_like(x) if dys[i] is None else dys[i].contiguous()
        dlast = None if dlast is None else dlast.contiguous()
        sizes = _sizes(x, taps, cu_seqlens, head)
        dtaps = taps.new_empty(sizes[1], *taps.shape)
        dstate = None if state is None else torch.empty_like(state)
        LIBRARY.call(
            f"convolution_backward_{NAMES[x.dtype]}",
            *(*sizes, x, taps, state, normalized >> i & 1, dy, dlast, dx, dtaps, dstate, torch.get_num_threads()),
        )
        grads[i] = dtaps.sum(0).t().unsqueeze(1).contiguous()
        if dstate is not None:
            grads[STREAMS + i] = dstate
    return (*dxs, *grads)


_INPUTS = (
    "Tensor x0, Tensor? x1, Tensor? x2, Tensor w0, Tensor? w1, Tensor? w2, Tensor? s0, Tensor? s1, Tensor? s2,"
    " Tensor? cu_seqlens, int normalized, int head"
)
_library = torch.library.Library("lkda", "FRAGMENT")
_library.define(f"short_conv_cpu_forward({_INPUTS}) -> ({', '.join(['Tensor'] * 6)})")
_library.define(
    "short_conv_cpu_backward(Tensor? dy0, Tensor? dy1, Tensor? dy2, Tensor? dl0, Tensor? dl1, Tensor? dl2,"
    f" {_INPUTS}) -> ({', '.join(['Tensor'] * 9)})"
)
_library.impl("short_conv_cpu_forward", _forward, "CPU")
_library.impl("short_conv_cpu_backward", _backward, "CPU")


@torch.library.register_fake("lkda::short_conv_cpu_forward", lib=_library)
def _(x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized, head):
    streams = _streams((x0, x1, x2), (w0, w1, w2), (s0, s1, s2))
    pairs = [_results(x, taps.shape[0], cu_seqlens) for _, x, taps, _ in streams]
    return _six(x0, [y for y, _ in pairs], [last for _, last in pairs])


@torch.library.register_fake("lkda::short_conv_cpu_backward", lib=_library)
def _(dy0, dy1, dy2, dl0, dl1, dl2, x0, x1, x2, w0, w1, w2, s0, s1, s2, cu_seqlens, normalized, head):
    given = (x0, x1, x2, w0, w1, w2, s0, s1, s2)
    return tuple(x0.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _save(ctx, inputs, output):
    *tensors, ctx.normalized, ctx.head = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradients(ctx, *grads):
    tensors = ctx.saved_tensors
    first = next((x for x in grads if x is not None), None)
    backward: Callable = _backward if can_bypass_dispatcher(first) else torch.ops.lkda.short_conv_cpu_backward
    found = backward(*grads, *tensors, ctx.normalized, ctx.head)
    return *(None if x is None else d for x, d in zip(tensors, found)), None, None, None


torch.library.register_autograd("lkda::short_conv_cpu_forward", _gradients, setup_context=_save, lib=_library)


_with_autograd = without_dispatcher(_forward, _save, _gradients)


def _three(tensors: Sequence[Tensor]) -> Optional3:
    first, second, third, *_ = (*tensors, None, None, None)
    return first, second, third


def short_convolutions_cpu(
    xs: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor] | None,
    normalized: Sequence[bool],
    head_dim: int,
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The convolutions in C++, differentiable. Arguments and results as in `short_convolutions`; without weights the
    norm alone, in PyTorch."""
    if weights is None:
        return tuple(normalize_torch(x.unflatten(-1, (-1, head_dim))).flatten(-2) for x in xs), ()
    inputs = [xs] if isinstance(xs, Tensor) else list(xs)
    dtype, result = compute_dtype(inputs[0]), inputs[0].dtype
    given = [_three([x.to(dtype) for x in tensors]) for tensors in (inputs, weights, states or ())]
    tensors = tuple(x for three in given for x in three)
    forward: Callable = torch.ops.lkda.short_conv_cpu_forward
    if can_bypass_dispatcher(*tensors):
        forward = _with_autograd if wants_gradient(*tensors) else _forward
    bits = sum(1 << i for i, word in enumerate(normalized) if word)
    found = forward(*tensors, cu_seqlens, bits, head_dim or weights[0].shape[0])
    count = len(weights)
    kept = weights if states is None else states
    lasts = zip(found[STREAMS : STREAMS + count], kept)
    return tuple(y.to(result) for y in found[:count]), tuple(last.to(x.dtype) for last, x in lasts)
