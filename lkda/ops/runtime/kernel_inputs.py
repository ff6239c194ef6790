"""What the kernels accept: head sizes, dtypes, and tensors that they can read 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lkda.ops.runtime.jit import reason_cannot_run

HEAD_DIMS = (32, 64, 128)
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float"}

Reason = Callable[[torch.device, int, torch.dtype], str | None]


def cannot_take(otherwise: str, head_dims: Sequence[int] | None = HEAD_DIMS) -> Reason:
    """The `cannot_run` of a backend with such kernels: (device, head_dim, dtype) -> the reason, or None if it can run.

    Args:
        otherwise: the backend to name in the reason, which can do what the kernels cannot.
        head_dims: the head sizes that the kernels take; None: all.
    """

    def reason(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
        if device.type == "cuda" and head_dims is not None and head_dim not in head_dims:
            sizes = ", ".join(map(str, head_dims))
            return f"the kernel takes heads of {sizes}, got {head_dim}; use backend={otherwise!r}."
        if device.type == "cuda" and dtype not in ELEMENTS:
            return f"the kernel takes bfloat16, float16 and float32, got {dtype}; use backend={otherwise!r}."
        return reason_cannot_run(device, otherwise)

    # What torch.compiler.assume_constant_result does; but that imports torch._dynamo, which takes seconds.
    reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return reason


def readable(x: Tensor) -> Tensor:
    """x if it is contiguous and aligned to 16 bytes, else a copy that is."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def float32_or(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x as `readable` returns it, converted to float32 if it is neither that nor of `dtype`."""
    return readable(x if x.dtype in (torch.float32, dtype) else x.float())


def readable_rows(x: Tensor) -> Tensor:
    """x [B, ...] if each x[i] is contiguous and aligned to 16 bytes, else a contiguous copy that is aligned."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if aligned and len(x) and x[0].is_contiguous() else readable(x)


def in_rows(*heads: Tensor) -> list[Tensor]:
    """q, k and v [B, H, D] with one stride from sequence to sequence; copied where they have none."""
    rows = [readable_rows(x) for x in heads]
    return rows if len({x.stride(0) for x in rows}) == 1 else [readable(x) for x in heads]
