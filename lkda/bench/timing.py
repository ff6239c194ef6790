"""The clock, and the memory's speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    p20: float
    p80: float


def clock(call: Callable[[], object], device: torch.device, *, milliseconds: int = 100) -> Timing:
    """Time a call, repeated for about `milliseconds` after a warm-up of a quarter of that.

    On a GPU by events, with the L2 cache flushed before each call (triton.testing.do_bench); on a CPU by its clock.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=milliseconds // 4, rep=milliseconds, quantiles=list(QUANTILES)))
    call()
    times: list[float] = []
    deadline = time.perf_counter() + milliseconds / 1e3
    while not times or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return Timing(*torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist())


def host_microseconds(call: Callable[[], object]) -> float:
    """What the host takes to put a call's kernels on the stream, without waiting for them: median of 20."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call puts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes read and written by a large copy, per second, in units of 1e9."""
    size = 2**29 if device.type == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock(lambda: target.copy_(source), device).median / 1e6


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured in a CUDA graph: its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
