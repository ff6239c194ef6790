"""Starts the processes of a run on several devices, through Lightning's launcher, torchrun or Slurm."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lkda.checks import InputError
from lkda.commands.command_line.errors import FAILED, CommandError
from lkda.commands.command_line.invocation import given_overrides
from lkda.training.options import TrainerOptions

T = TypeVar("T")
# Where the first process of a node leaves its process id for those that it starts.
_FIRST = "LKDA_FIRST_PROCESS"
# For which a process waits for those that it has started, when the run has ended.
_SECONDS_TO_END = 20.0
_SECONDS_TO_REPORT = 5.0
# What Lightning's launcher sets for the processes that it starts.
_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")


class Processes:
    """The processes of a run, one for each device. It is a context, at whose end they part. Processes that something
    else has started stay together for the next run of a sweep.

    If nothing else has started them, the first process starts the others of its node in `join`: they run the same
    command again. torchrun, Slurm, or a command on each node may also start them.

    If a run ends with an error, processes of it that `join` has started and that do not end by themselves are killed:
    one that hangs would otherwise keep its device.

    Attributes:
        rank: the number of this process among all.
        local_rank: its number among those of its node.
        group: all processes, for values on the CPU; None before `join`, and for trainer.strategy=single.
        environment: who started the processes; None for trainer.strategy=single.
    """

    def __init__(self, options: TrainerOptions, *, accelerator: str) -> None:
        if options.strategy == "single" and TorchElasticEnvironment.detect() and _processes_of_torchrun() > 1:
            raise InputError(
                f"torchrun has started {_processes_of_torchrun()} processes, each of which would train by itself: "
                "choose trainer=ddp or trainer=fsdp."
            )
        self._options, self._accelerator = options, accelerator
        self.environment = _environment() if options.strategy != "single" else None
        self.rank, self.local_rank, self.group = 0, 0, None
        self._started_elsewhere = False
        self._others: list[subprocess.Popen[bytes]] = []  # that `join` has started
        if self.environment is not None:
            self._place(self.environment)
        self._before = {name: os.environ.get(name) for name in _VARIABLES}

    def _place(self, environment: ClusterEnvironment) -> None:
        options = self._options
        self.local_rank = environment.local_rank()
        self._started_elsewhere = environment.creates_processes_externally
        self.rank = environment.node_rank() * options.devices + self.local_rank
        if not isinstance(environment, LightningEnvironment):
            self.rank, there = environment.global_rank(), environment.world_size()
            if there != options.world_size:
                raise InputError(
                    f"trainer.devices={options.devices} and trainer.num_nodes={options.num_nodes} make "
                    f"{options.world_size} processes, but {there} were started; make the numbers equal."
                )

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.group is None:
            self._end_others()  # of a `join` that failed
            return
        if self._started_elsewhere:  # they have one address, at which they can meet once
            dist.destroy_process_group(self.group)
            return
        dist.destroy_process_group()
        self._end_others()
        # The next run of a sweep in this process starts processes of its own.
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        rank_zero_only.rank = fabric_rank_zero_only.rank = 0

    def give_up(self, message: str) -> NoReturn:
        """Print the error and end this process at once, with those that it has started. Nothing is freed."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        for other in self._others:
            other.kill()
        os._exit(FAILED)

    def _end_others(self) -> None:
        """Wait a while for the processes that were started, and kill those that do not end."""
        deadline = time.monotonic() + _SECONDS_TO_END
        for other in self._others:
            try:
                other.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
        # Lightning watches this list for as long as this process lives, and kills it for one that has failed: also if
        # it has reported the failure, and is in the next run of a sweep.
        self._others.clear()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def join(self) -> None:
        """Start the other processes of the node if nothing else does, and wait for all.

        Raises: CommandError if not all of them come.
        """
        options = self._options
        if self.environment is None:
            return
        first = os.environ.pop(_FIRST, None)
        if first is not None:  # which may have ended already
            threading.Thread(target=_end_with_parent, args=[int(first)], daemon=True).start()
        timeout = timedelta(minutes=options.timeout_minutes)
        fabric = Fabric(
            accelerator=self._accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=DDPStrategy(timeout=timeout, cluster_environment=self.environment),
        )
        try:
            try:
                with _arguments_of_this_run():
                    fabric.launch()
            finally:
                self._others = getattr(fabric.strategy.launcher, "procs", [])
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        except RuntimeError as error:
            if not is_of_another_process(error):
                raise
            raise CommandError(
                f"the {options.world_size} processes of the run did not find each other within "
                f"{options.timeout_minutes} minutes (trainer.timeout_minutes): {str(error).splitlines()[0]}"
            ) from error

    def context_group(self, size: int) -> Any:
        """The processes that divide each row of a batch among themselves: `size` with consecutive ranks. All processes
        must call it."""
        timeout = timedelta(minutes=self._options.timeout_minutes)
        firsts = range(0, self._options.world_size, size)
        groups = [dist.new_group(range(first, first + size), timeout=timeout) for first in firsts]
        return groups[self.rank // size]

    def dismiss(self) -> None:
        """Tell processes that were started elsewhere, and wait in `receive`, that there is nothing to do."""
        if self._started_elsewhere and self._options.world_size > 1:
            self.join()
            self.send(None)

    def send(self, value: Any) -> None:
        """From the first process to all others, which call `receive`."""
        if self.group is not None:
            dist.broadcast_object_list([value], src=0, group=self.group)

    def receive(self) -> Any:
        """What the first process sends."""
        box = [None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def one_at_first(self, prepare: Callable[[], T]) -> T:
        """What `prepare` returns. On each node one process calls it before the others, which find what it has cached.

        The first process of the run has called it already, before `join`, and calls `wait` instead.
        """
        if self.local_rank == 0:
            result = prepare()
            self.wait()
            return result
        self.wait()
        return prepare()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.group is not None:
            dist.barrier(group=self.group)


def _processes_of_torchrun() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether an exchange with another process has failed. Gloo has no error type of its own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _environment() -> ClusterEnvironment:
    """Who starts processes: torchrun, Slurm (`srun`), or Lightning. It is chosen as Lightning's trainer chooses it."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def _end_with_parent(parent: int) -> None:
    """End this process a while after its parent has ended, also if that was killed. It may wait for it in an exchange
    that nothing interrupts, and would keep its device for as long as trainer.timeout_minutes."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(_SECONDS_TO_REPORT)  # an exchange that fails has an error line of its own
    print("error: the first process of the run has ended. Continue with resume=true.", file=sys.stderr, flush=True)
    os._exit(FAILED)


@contextmanager
def _arguments_of_this_run() -> Iterator[None]:
    """Lightning starts the other processes with the main module of this one and sys.argv. A job of a sweep needs its
    own settings there, the console command the name of the command, and a job in a worker process of a launcher lkda's
    module in place of the launcher's."""
    main = sys.modules["__main__"]
    arguments, spec = sys.argv, main.__spec__
    os.environ[_FIRST] = str(os.getpid())
    if HydraConfig.initialized():
        by_name = Path(arguments[0]).name in ("lkda", "__main__.py")
        if spec is not None and spec.name.partition(".")[0] != "lkda":
            main.__spec__, by_name = importlib.util.find_spec("lkda.__main__"), True
        sys.argv = [arguments[0], *(["train"] if by_name else []), *given_overrides(without=("hydra.run.dir",))]
    try:
        yield
    finally:
        sys.argv, main.__spec__ = arguments, spec
        del os.environ[_FIRST]
