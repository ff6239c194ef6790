"""Which implementation of an op runs. Its name, the backend, is resolved once and never changed silently.

Each op's module `lkda.ops.<op>.op` has a dict `BACKENDS` from a name to a `Backend`, fastest first. `auto` is the first
automatic one that can run on the device. Asking for a backend that cannot run is an error that says why.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lkda.checks import InputError


def always(device: torch.device, head_dim: int, dtype: torch.dtype) -> str | None:
    """For a backend in PyTorch, which can always run."""
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Args:
        run: the function. It takes the op's arguments, already checked.
        cannot_run: (device, head_dim, dtype) -> the reason why it cannot run there, or None if it can.
        automatic: whether `auto` may choose it.
    """

    run: Callable[..., Any]
    cannot_run: Callable[[torch.device, int, torch.dtype], str | None] = always
    automatic: bool = True


def choose(
    name: str,
    backends: Mapping[str, Backend],
    backend: str,
    *,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
) -> str:
    """The name of the backend that runs. Raises ValueError if `backend` is unknown or cannot run."""
    # torch.compile makes a size that has changed symbolic; this makes it a number again.
    head_dim = operator.index(head_dim)
    if backend == "auto":
        for word, candidate in backends.items():
            if candidate.automatic and candidate.cannot_run(device, head_dim, dtype) is None:
                return word
        raise InputError(f"{name}(backend='auto'): none of {', '.join(backends)} can run on {device} in {dtype}.")
    if backend not in backends:
        raise InputError(f"{name}: backend must be one of auto, {', '.join(backends)}, got {backend!r}.")
    reason = backends[backend].cannot_run(device, head_dim, dtype)
    if reason is not None:
        raise InputError(f"{name}(backend={backend!r}): {reason}")
    return backend


def _backends(op: str) -> Mapping[str, Backend]:
    try:
        return importlib.import_module(f"lkda.ops.{op}.op").BACKENDS
    except ModuleNotFoundError as error:
        raise InputError(f"there is no op {op!r} in lkda.ops (looked for lkda/ops/{op}/op.py)") from error


def available_backends(op: str) -> tuple[str, ...]:
    """The backends of `op` ("kda", "simplified", "softmax"), `auto` first."""
    return ("auto", *_backends(op))


def resolve_backend(op: str, backend: str, *, device: torch.device | str, head_dim: int, dtype: torch.dtype) -> str:
    """The backend of `op` that runs on `device` for `backend`, which may be `auto`.

    Raises: ValueError for an unknown backend, or one that cannot run there, with the reason.
    """
    return choose(op, _backends(op), backend, device=torch.device(device), head_dim=head_dim, dtype=dtype)
