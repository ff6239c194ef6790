"""Checks of shapes, dtypes and devices. Each error is one sentence that names the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lkda.checks import InputError


def check_shape(fn: str, name: str, x: Tensor, axes: str, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `x` has these axes (letters, as in "B T H K") with the sizes known so far.

    The size of a letter that is not yet in `sizes` is added to it.
    """
    letters, shape = axes.split(), x.shape
    if len(shape) != len(letters):
        raise InputError(f"{fn}: {name} must be [{', '.join(letters)}], got a shape of {list(shape)}.")
    for letter, size in zip(letters, shape):
        if sizes.setdefault(letter, size) != size:
            want = [sizes.get(a, a) for a in letters]
            raise InputError(
                f"{fn}: {name} must be [{', '.join(letters)}] = {want}, got {list(shape)}: "
                f"{letter} is {sizes[letter]} in the tensors before it."
            )


def alike(first: Tensor, *others: Tensor) -> bool:
    """Whether all tensors are floating point and have the shape and device of the first one.

    This is a quick test before the checks that find out what is wrong.
    """
    shape, device = first.shape, first.device
    for x in others:
        if x.shape != shape or x.device != device or not x.dtype.is_floating_point:
            return False
    return first.dtype.is_floating_point


def check_alike(fn: str, tensors: dict[str, Tensor | None], *, same_dtype: tuple[str, ...]) -> None:
    """Raises ValueError unless all tensors are floating point and on one device.

    Those named in `same_dtype` must also have one dtype. A tensor that is None is skipped.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    for name, x in given.items():
        if not x.dtype.is_floating_point:
            raise InputError(f"{fn}: {name} must be a floating-point tensor, got {x.dtype}.")
        if x.device != first.device:
            raise InputError(f"{fn}: {name} is on {x.device} and {first_name} on {first.device}; move one of them.")
        if name in same_dtype and x.dtype != first.dtype:
            raise InputError(f"{fn}: {name} is {x.dtype} and {first_name} {first.dtype}; cast one of them.")


def check_cu_seqlens(fn: str, cu_seqlens: Tensor, batch: int, length: int) -> None:
    """Raises ValueError unless cu_seqlens is int [N + 1], begins with 0, never decreases and ends with T.

    The values are checked only on a CPU, since reading them from a GPU would wait for it.
    """
    if batch != 1:
        raise InputError(f"{fn}: with cu_seqlens the sequences are packed in one row (B = 1), got B = {batch}.")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"{fn}: cu_seqlens must be int32 or int64 [N + 1] with N >= 1, "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in zip(bounds, bounds[1:])):
        shown = bounds if len(bounds) <= 8 else [*bounds[:3], "...", *bounds[-3:]]
        raise InputError(f"{fn}: cu_seqlens must go from 0 to T = {length} and never fall, got {shown}.")


def check_step_caches(
    fn: str, weights: Sequence[Tensor], caches: Sequence[Tensor], device: torch.device, sizes: dict[str, int]
) -> None:
    """Raises ValueError unless these are the filters [H * D, 1, W] of the convolutions of q, k and v, and their caches
    [B, W - 1, H * D], which a decoding step can write in place; or none."""
    if len(weights) not in (0, 3) or len(caches) != len(weights):
        raise InputError(
            f"{fn}: three weights and three caches (of q, k and v), or none; got {len(weights)} and {len(caches)}."
        )
    sizes["1"], sizes["C"] = 1, sizes["H"] * sizes["D"]
    for i, (weight, cache) in enumerate(zip(weights, caches)):
        check_shape(fn, f"weights[{i}]", weight, "C 1 W", sizes)
        sizes["W-1"] = sizes["W"] - 1
        check_shape(fn, f"caches[{i}]", cache, "B W-1 C", sizes)
        if weight.device != device:
            raise InputError(f"{fn}: weights[{i}] is on {weight.device} and q on {device}; move one of them.")
        for name, x, first in (("weights", weight, weights[0]), ("caches", cache, caches[0])):
            if x.dtype != first.dtype or not x.dtype.is_floating_point:
                raise InputError(f"{fn}: the {name} share a floating-point dtype, got {first.dtype} and {x.dtype}.")
    check_in_place(fn, {f"caches[{i}]": x for i, x in enumerate(caches)}, device)


def check_in_place(fn: str, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Raises ValueError unless a kernel on q's device can write these tensors in place."""
    for name, x in tensors.items():
        if x.device != device:
            raise InputError(f"{fn}: {name} is on {x.device} and q on {device}; move one of them.")
        if not x.is_contiguous() or (x.is_cuda and x.data_ptr() % 16):
            raise InputError(f"{fn}: {name} is written in place and must be contiguous and aligned to 16 bytes.")
