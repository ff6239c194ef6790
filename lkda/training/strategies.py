"""How several devices train one model: Lightning's strategies for `trainer.strategy`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lkda.training.checkpoint import read_checkpoint
from lkda.training.sharded_checkpoint import complete, rows_of, write_part

# Of gradients that DDP averages in one exchange. DDP's own size is 25 MB. `base` on two H200, tokens/s: 282,869 with
# 25 MB, 289,237 with 200 MB, 288,414 with all gradients in one exchange.
BUCKET_MB = 200


def build_strategy(
    name: str, *, world_size: int, timeout: timedelta, environment: ClusterEnvironment | None
) -> Strategy | str:
    """Lightning's strategy.

    Args:
        name: "single": one device.
            "ddp": each device holds the model, and gradients are averaged while the backward pass runs.
            "fsdp": each device holds a part of the weights, gradients and optimizer state. A layer's weights are
            gathered, in float32, when it needs them.
        world_size: the number of devices.
        timeout: how long a process waits for the others.
        environment: who started the processes; None for "single".
    """
    if name == "ddp":
        # Buffers hold what each process has measured of its own share.
        return ReplicatedStrategy(
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            bucket_cap_mb=BUCKET_MB,
            timeout=timeout,
            cluster_environment=environment,
        )
    if name == "fsdp":
        strategy = ShardedStrategy(data_parallel_size=world_size, tensor_parallel_size=1, timeout=timeout)
        strategy.cluster_environment = environment
        return strategy
    return "auto"


class AveragesGradients(Protocol):
    """A task whose gradients DDP averages."""

    def average_gradients(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Compute the loss for training with a module that `wrap` returns."""

    def without_averaging(self) -> AbstractContextManager[None]:
        """In this context a backward pass adds to the gradients and does not average them."""


class ReplicatedStrategy(DDPStrategy):
    """Lightning's strategy for DDP. DDP wraps the loss instead of the whole task, so that forward, backward and the
    averaging of the gradients are one function."""

    def configure_ddp(self) -> None:
        cast(AveragesGradients, self.lightning_module).average_gradients(self._setup_model)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        with cast(AveragesGradients, self.lightning_module).without_averaging():
            yield


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with checkpoints in the form of `lkda.training.sharded_checkpoint`.

    A run may be resumed from the checkpoint of a run on any other number of devices, with any strategy.
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        name, save = self.broadcast((filepath, uuid.uuid4().hex))
        path = Path(name)
        write_part(checkpoint, path, rank=self.global_rank, count=self.world_size, save=save)
        self.barrier()
        if self.is_global_zero:
            complete(path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        return read_checkpoint(path, rank=self.global_rank, count=self.world_size)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        rows = {name: self._as_shared(tensor, like=own[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(rows, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {
                    name: self._as_shared(value, like=parameters[number]) if _is_like_parameter(value) else value
                    for name, value in entries.items()
                }
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _as_shared(self, tensor: Tensor, *, like: Tensor) -> Tensor:
        """A whole tensor, or the rows of it that this process has, in the form of `like`."""
        if not isinstance(like, DTensor):
            return tensor
        if tensor.shape[0] == like.shape[0] != like.to_local().shape[0]:
            first, last = rows_of(like.shape[0], self.global_rank, self.world_size)
            tensor = tensor[first:last]
        rows = tensor.to(device=like.device, dtype=like.dtype, copy=True)
        return DTensor.from_local(
            rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def _is_like_parameter(value: Any) -> bool:
    """Whether a value of an optimizer's state has a number for each number of its parameter, unlike a step count."""
    return isinstance(value, Tensor) and value.dim() > 0


def share_weights(task: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, *, methods: tuple[str, ...]) -> None:
    """Divide the weights of `task` by rows among the devices of the mesh. The weights of one block are gathered at a
    time.

    Args:
        methods: the methods of `task` that compute with the weights.
    """
    if isinstance(task, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh, reshard_after_forward=False)
    for method in methods:
        register_fsdp_forward_method(task, method)
