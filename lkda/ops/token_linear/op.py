"""The public functions: they choose a backend and run it. None of them is differentiable."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lkda.ops.runtime.backend import Backend, choose
from lkda.ops.runtime.kernel_inputs import HEAD_DIMS
from lkda.ops.token_linear import cuda, reference

_NORMED = {
    "cuda": Backend(cuda.normed_linear_cuda, cuda.cannot_run),
    "torch": Backend(reference.normed_linear_torch),
}
_GROUPED = {
    "cuda": Backend(cuda.grouped_linear_cuda, cuda.cannot_run),
    "torch": Backend(reference.grouped_linear_torch),
}
_ADD = {"cuda": Backend(cuda.add_linear_cuda, cuda.cannot_run), "torch": Backend(reference.add_linear_torch)}
_ADD_GATED = {
    "cuda": Backend(cuda.add_gated_linear_cuda, cuda.cannot_run),
    "torch": Backend(reference.add_gated_linear_torch),
}


def _word(fn: str, backends: dict[str, Backend], backend: str, x: Tensor, weight: Tensor, *sizes: int) -> str:
    """The backend for x [B, ...]. The kernel reads 16 bytes at a time, so all `sizes` must be multiples of those."""
    multiple = 16 // x.element_size()
    if backend == "auto" and (any(size % multiple for size in sizes) or x.dtype != weight.dtype):
        return "torch"
    return choose(fn, backends, backend, device=x.device, head_dim=len(x), dtype=x.dtype)


def normed_linear(
    x: Tensor, norm: Tensor, weight: Tensor, *, eps: float, swiglu: bool = False, backend: str = "auto"
) -> Tensor:
    """linear(rms_norm(x)) for one token per sequence: x [B, in] -> [B, out].

    Args:
        norm: the weight [in] of the norm.
        weight: [out, in].
        swiglu: `weight` [2 * out, in] holds the gate's rows, then the others: SiLU(gate) * other is returned.
        backend: auto | cuda | torch.
    """
    word = _word("normed_linear", _NORMED, backend, x, weight, weight.shape[1])
    y: Tensor = _NORMED[word].run(x, norm, weight, eps, swiglu)
    return y


def grouped_linear(x: Tensor, weight: Tensor, *, backend: str = "auto") -> Sequence[Tensor]:
    """A linear layer for each group of channels: x [B, groups * in], weight [groups, out, in] -> [B, out] for each."""
    word = _word("grouped_linear", _GROUPED, backend, x, weight, weight.shape[2])
    outputs: Sequence[Tensor] = _GROUPED[word].run(x, weight)
    return outputs


def add_linear_(x: Tensor, y: Tensor, weight: Tensor, *, backend: str = "auto") -> None:
    """x += linear(y), in place: x [B, out], y [B, in], weight [out, in]."""
    _ADD[_word("add_linear_", _ADD, backend, y, weight, weight.shape[1])].run(x, y, weight)


def add_gated_linear_(
    x: Tensor, o: Tensor, gate: Tensor | None, norm: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto"
) -> None:
    """x += linear(gated_rms_norm(o, gate)), in place.

    Args:
        x: [B, out].
        o: [B, H, D].
        gate: [B, H * D], or None for no gate.
        norm: the weight [D] of the norm of each head.
        weight: [out, H * D].
        eps: of the norm.
        backend: auto | cuda | torch.
    """
    if backend == "auto" and o.shape[-1] not in HEAD_DIMS:
        backend = "torch"
    word = _word("add_gated_linear_", _ADD_GATED, backend, o, weight, weight.shape[1])
    _ADD_GATED[word].run(x, o, gate, norm, weight, eps)


def takes(x: Tensor) -> bool:
    """Whether the kernel takes x [B, in], so that the weights of norms are best given in float32."""
    return x.device.type == "cuda" and cuda.cannot_run(x.device, len(x), x.dtype) is None


def gains(weight: Tensor) -> bool:
    """Whether these functions gain anything for a model with such weights: on a GPU, in one of the kernel's dtypes."""
    return weight.device.type == "cuda" and weight.dtype in cuda.DTYPES
