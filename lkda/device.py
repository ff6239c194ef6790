"""The device that an option such as `trainer.accelerator=auto` selects, and the memory of the machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lkda.checks import InputError

CPU, AUTO = "cpu", "auto"
# Processes that train on one CPU, if it has fewer cores. More are a mistake, and would fill the memory.
_MOST_ON_CPU = 16


def resolve_device_count(count: int | str, device: torch.device) -> int:
    """The number of devices of this machine that `trainer.devices` selects, where `auto` is all GPUs, or one CPU.

    Raises: InputError if there are fewer GPUs, or if the CPU would have many more processes than cores.
    """
    there = torch.cuda.device_count() if device.type == "cuda" else None
    if count == AUTO:
        return there or 1
    if there is not None and int(count) > there:
        raise InputError(f"trainer.devices={count}: torch sees {there} GPU{'s' * (there != 1)}; use at most that many.")
    most = max(_MOST_ON_CPU, os.cpu_count() or 1)
    if there is None and int(count) > most:
        raise InputError(f"trainer.devices={count} would start {count} processes on the CPU: use at most {most}.")
    return int(count)


def resolve_device(
    word: object, *, option: str = "accelerator", gpu: str = "gpu", instead: str | None = None
) -> torch.device:
    """The device that `auto`, `cpu` or `gpu` selects. `auto` is a GPU if torch finds one, else the CPU.

    Args:
        word: the value that the user gave.
        option: the option's name, for the message.
        gpu: the value that means a GPU for this option.
        instead: for the message, what to give if there is no GPU. None means the option's other values.
    Raises: InputError for another value, or if a GPU was requested and torch finds none.
    """
    if word not in (AUTO, CPU, gpu):
        raise InputError(f"{option} must be {AUTO}, {CPU} or {gpu}, got {word!r}.")
    others = f"{option}={CPU} or {option}={AUTO}"
    there = torch.cuda.is_available()
    if word == gpu and not there:
        raise InputError(f"{option}={gpu}: a GPU was asked for and torch sees no CUDA device; use {instead or others}.")
    return torch.device("cuda" if there and word != CPU else CPU)


@contextmanager
def one_cpu_thread(device: torch.device) -> Iterator[None]:
    """In this context PyTorch computes on the CPU with one thread, if `device` is a GPU. The CPU then only prepares
    batches. Users who set OMP_NUM_THREADS have that many threads.

    With a thread for each core, copying a batch into pinned memory waits for several threads. Those of runs side by
    side then slow each other down: four small models on one H200 took 21 ms per step, and with one thread each 7.4.
    """
    before = torch.get_num_threads()
    if device.type == "cuda" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(count: int) -> str:
    """The number of threads in words: "1 thread", "2 threads"."""
    return f"{count} thread{'s' * (count != 1)}"


def device_name(device: torch.device) -> str:
    """The kind of device: the GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not on Linux
        found = None
    return f"{found[1].strip() if found else 'cpu'}, {in_threads(torch.get_num_threads())}"


def physical_memory() -> int:
    """The bytes of the machine's memory, which is that of the device "cpu"."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
