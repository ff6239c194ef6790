"""Calls of C++ on a CPU that are recorded once and then repeated, as a CUDA graph repeats kernels.

    with recorded() as recording:
        y = function_of(x)          # it runs, and its calls are recorded
    recording.repeat()              # the same calls on the same tensors: new numbers in x give new numbers in y

What is recorded are calls of `Library`. Another operation of PyTorch that computes something would be missing when the
calls are repeated, so it makes the recording unusable, and `refused` names it. Views and uninitialised tensors are
allowed. The memory of all tensors is kept as long as the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lkda.ops.runtime import cpp

_UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
}


class Recording:
    """Calls in their order.

    Attributes:
        refused: the operation because of which the calls must not be repeated; None where they may be.
    """

    def __init__(self) -> None:
        self.refused: str | None = None
        self._calls: list[tuple[Callable[..., Any], tuple[object, ...]]] = []
        self._kept: list[Tensor] = []

    def add(self, entry: Callable[..., Any], converted: tuple[object, ...], arguments: tuple[object, ...]) -> None:
        self._calls.append((entry, converted))
        # A parameter may be given other memory later; a tensor of its own keeps the memory that was recorded.
        self._kept += [x.detach() for x in tree_leaves(arguments) if isinstance(x, Tensor)]

    def repeat(self) -> None:
        for entry, arguments in self._calls:
            entry(*arguments)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Records the calls that are made inside."""
    recording = Recording()
    with _Watch(recording), cpp.calls_added_to(recording.add):
        yield recording


class _Watch(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in _UNINITIALISED and not _is_view(func, args, found):
            self.recording.refused = self.recording.refused or str(func)
        return found


def _is_view(func: Any, args: Any, found: Any) -> bool:
    """Whether `found` is memory of the arguments that was not written. An operation such as `contiguous` may copy."""
    aliases = [result.alias_info for result in func._schema.returns]
    if not aliases or any(alias is None or alias.is_write for alias in aliases):
        return False
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(x.untyped_storage().data_ptr() in given for x in tree_leaves(found))
