"""Runs a function in several processes, which train together as the processes of torchrun do."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

SECONDS = 60  # after which the processes of a test are ended


def on_ranks(count: int, function: Callable[[int], Any], directory: Path, *, killed: Collection[int] = ()) -> list[Any]:
    """What `function(rank)` returns in each of `count` processes; None for those that are killed.

    The processes are forks of this one, so that they need not import torch again. Their output goes to this process's.

    Args:
        directory: for the results.
        killed: the processes that are ended by SIGKILL before they return.
    Raises: AssertionError, with the traceback, if the function raises in one of them, or if another one is killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    children = [_fork(rank, count, port, function, directory) for rank in range(count)]
    expected = [-signal.SIGKILL if rank in killed else 0 for rank in range(count)]
    codes = _wait(children, expected)
    files = [directory / f"{rank}.pickle" for rank in range(count)]
    failures = [(directory / f"{rank}.txt") for rank in range(count)]
    assert codes == expected, "\n".join(file.read_text() for file in failures if file.exists())
    return [None if rank in killed else pickle.loads(file.read_bytes()) for rank, file in enumerate(files)]


def _wait(children: list[int], expected: list[int]) -> list[int]:
    """Their exit codes. When one fails, or after a minute, the others are ended: they may wait for it."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < len(children):
        for child, code in zip(children, expected, strict=True):
            found, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] != code:
                    deadline = min(deadline, time.monotonic() + 1)
        if time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _fork(rank: int, count: int, port: int, function: Callable[[int], Any], directory: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        (directory / f"{rank}.pickle").write_bytes(pickle.dumps(function(rank)))
        code = 0
    except BaseException:
        (directory / f"{rank}.txt").write_text(f"process {rank}: {traceback.format_exc()}")
    finally:
        os._exit(code)
