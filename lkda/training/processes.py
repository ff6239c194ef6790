"""The processes of a run, one for each device: sums over all of them, and values of the first for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def process_count() -> int:
    """The number of processes that train together; 1 if the run has one process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_count_of(group: Any) -> int:
    """The number of processes in that group."""
    return dist.get_world_size(group)


def sum_over_processes(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes. This does not wait for the device. All processes must call it,
    with tensors of the same shapes."""
    if process_count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def value_of_first(value: Any) -> Any:
    """The value that the first process gives, on every process. It must be picklable."""
    if process_count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def everywhere(condition: bool, *, device: torch.device) -> bool:
    """Whether the condition holds on every process. This waits for the device."""
    if process_count() == 1:
        return condition
    answer = torch.tensor(int(condition), device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MIN)
    return bool(answer)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this device: all of it, unless the devices share it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
