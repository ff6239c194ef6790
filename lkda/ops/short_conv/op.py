"""The public functions: they check their arguments, choose a backend and run it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkda.checks import InputError
from lkda.ops.checks import check_alike, check_cu_seqlens, check_shape
from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.short_conv import cpu, cuda
from lkda.ops.short_conv.reference import convolve_torch, normalize_torch

MAX_STREAMS = 3


def _torch(
    xs: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor] | None,
    normalized: Sequence[bool],
    head_dim: int,
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    ys, lasts = [], []
    # Streams side by side are convolved one by one: on a CPU one convolution of all their channels is slower.
    for i, x in enumerate(xs.chunk(len(normalized), -1) if isinstance(xs, Tensor) else xs):
        if weights is not None:
            x, last = convolve_torch(x, weights[i], None if states is None else states[i], cu_seqlens)
            lasts.append(last)
        ys.append(normalize_torch(x.unflatten(-1, (-1, head_dim))).flatten(-2) if normalized[i] else x)
    return tuple(ys), tuple(lasts)


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(cuda.short_convolutions_cuda, cuda.reason_cannot_run),
    "cpu": Backend(cpu.short_convolutions_cpu, cpu.reason_cannot_run),
    "torch": Backend(_torch),
}
# For what the CUDA kernels cannot do: filters of more than 4 taps, and rows that are no multiple of 16 bytes.
_WITHOUT_KERNELS = {word: BACKENDS[word] for word in ("cpu", "torch")}


def short_convolutions(
    xs: Sequence[Tensor] | Tensor,
    weights: Sequence[Tensor],
    *,
    normalized: Sequence[bool] | None = None,
    head_dim: int | None = None,
    states: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Causal depthwise convolutions with SiLU of up to three tensors of one shape (q, k and v), in one launch.

        y_t = SiLU(sum_s w_s x_{t-s}), s < width, per channel, no bias;    y / sqrt(sum over the head of y^2 + 1e-6)

    Args:
        xs: tensors [B, T, channels] of one dtype; or one tensor [B, T, len(weights) * channels] that has them side by
            side. Its gradient is then one tensor too.
        weights: [channels, 1, width] each, the newest token last; as a depthwise nn.Conv1d holds them.
        normalized: for each tensor whether to divide it by its L2 norm over each head of `head_dim` channels. None: no
            tensor.
        states: the inputs before each sequence, [B, width - 1, channels], or [N, width - 1, channels] with cu_seqlens.
            None for zeros.
        cu_seqlens: int [N + 1], the boundaries of N sequences packed in one row (B = 1); they may be empty.
        backend: auto | cuda | cpu | torch.
    Returns: for each x a y of its shape and dtype, and the states after each sequence, in the dtype of the given
        states, or of the weights without states.
    Raises: ValueError if a shape, dtype or device does not fit; the message names the tensor.
    """
    fn = "short_convolutions"
    streams = _streams(fn, xs, len(weights))
    sizes: dict[str, int] = {"1": 1}
    tensors: dict[str, Tensor | None] = {}
    for i, x in enumerate(streams):
        check_shape(fn, f"xs[{i}]", x, "B T C", sizes)
        tensors[f"xs[{i}]"] = x
    if sizes["T"] == 0:
        raise InputError(f"{fn}: T must be at least 1, got x of {list(streams[0].shape)}.")
    for i, weight in enumerate(weights):
        check_shape(fn, f"weights[{i}]", weight, "C 1 W", sizes)
    rows = "B"
    if cu_seqlens is not None:
        check_cu_seqlens(fn, cu_seqlens, sizes["B"], sizes["T"])
        sizes["N"], rows = len(cu_seqlens) - 1, "N"
    if states is not None:
        sizes["W-1"] = sizes["W"] - 1
        for i, state in enumerate(states):
            check_shape(fn, f"states[{i}]", state, f"{rows} W-1 C", sizes)
            tensors[f"states[{i}]"] = state
    normalized = _normalized(fn, streams, normalized, head_dim)
    check_alike(
        fn,
        tensors | {f"weights[{i}]": weight for i, weight in enumerate(weights)},
        same_dtype=tuple(f"xs[{i}]" for i in range(len(streams))),
    )
    word = _choose(fn, streams, weights[0].shape[-1], normalized, head_dim, backend)
    return BACKENDS[word].run(xs, weights, normalized, head_dim or 0, states, cu_seqlens)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    head_dim: int | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`short_convolutions` for one tensor. With `head_dim`, each head of the result is divided by its L2 norm."""
    ys, states = short_convolutions(
        (x,),
        (weight,),
        normalized=(head_dim is not None,),
        head_dim=head_dim,
        states=None if state is None else (state,),
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return ys[0], states[0]


def l2_normalized(*xs: Tensor, backend: str = "auto") -> tuple[Tensor, ...]:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension, of up to three tensors [B, T, H, D] in one launch.

    Computed in float32 at least, in x's dtype.
    """
    fn = "l2_normalized"
    sizes: dict[str, int] = {}
    for i, x in enumerate(xs):
        check_shape(fn, f"xs[{i}]", x, "B T H D", sizes)
    check_alike(fn, {f"xs[{i}]": x for i, x in enumerate(xs)}, same_dtype=tuple(f"xs[{i}]" for i in range(len(xs))))
    D = sizes["D"]
    flat = [x.flatten(2) for x in xs]
    word = _choose(fn, flat, 1, (True,), D, backend)
    ys, _ = BACKENDS[word].run(flat, None, (True,) * len(xs), D, None, None)
    return tuple(y.unflatten(-1, (-1, D)) for y in ys)


def _streams(fn: str, xs: Sequence[Tensor] | Tensor, count: int) -> Sequence[Tensor]:
    """The tensor of each of `count` weights."""
    if not isinstance(xs, Tensor):
        if not 1 <= len(xs) <= MAX_STREAMS or count != len(xs):
            raise InputError(f"{fn}: one to {MAX_STREAMS} tensors with a weight each, got {len(xs)} and {count}.")
        return xs
    if not 1 <= count <= MAX_STREAMS or xs.dim() != 3 or xs.shape[-1] % count:
        raise InputError(
            f"{fn}: xs as one tensor must be [B, T, weights * channels] for one to {MAX_STREAMS} weights, "
            f"got {list(xs.shape)} and {count} weights."
        )
    return xs.chunk(count, -1)


def _normalized(
    fn: str, xs: Sequence[Tensor], normalized: Sequence[bool] | None, head_dim: int | None
) -> tuple[bool, ...]:
    if normalized is None or not any(normalized):
        return (False,) * len(xs)
    channels = xs[0].shape[-1]
    if len(normalized) != len(xs) or not head_dim or channels % head_dim:
        raise InputError(
            f"{fn}: normalized needs a word for each of {len(xs)} tensors and a head_dim that divides {channels} "
            f"channels; got {tuple(normalized)} and head_dim={head_dim}."
        )
    return tuple(normalized)


def _choose(
    fn: str, xs: Sequence[Tensor], width: int, normalized: Sequence[bool], head_dim: int | None, backend: str
) -> str:
    fits = width <= cuda.MAX_TAPS and xs[0].shape[-1] * xs[0].element_size() % 16 == 0
    size = head_dim if head_dim and any(normalized) else cuda.HEAD_DIMS[0]
    backends = BACKENDS if fits else _WITHOUT_KERNELS
    return choose(fn, backends, backend, device=xs[0].device, head_dim=size, dtype=xs[0].dtype)
