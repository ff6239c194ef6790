"""How long a call takes, how fast memory can be copied, and how much of it is allocated."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

QUANTILES = (0.5, 0.2, 0.8)
# From the 20th to the 80th percentile, as a share of the median. A measurement whose spread is larger is noisy: it is
# repeated, up to MOST_MEASUREMENTS in all.
LARGEST_SPREAD = 0.2
MOST_MEASUREMENTS = 5
MOST_TIME = 20
LEAST_CALLS = 3  # on a CPU; a single call has no spread, so nothing would say that it was disturbed


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the 20th and 80th percentile of repeated calls."""

    median: float
    p20: float
    p80: float

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        return (self.p80 - self.p20) / self.median

    @property
    def is_noisy(self) -> bool:
        return self.spread > LARGEST_SPREAD


def clock(call: Callable[[], object], device: torch.device, *, milliseconds: float = 100) -> Timing:
    """Times a call that is repeated for about `milliseconds`, after a warm-up of a quarter of that.

    On a GPU, CUDA events measure the time and the L2 cache is flushed before each call (triton.testing.do_bench). On a
    CPU, `time.perf_counter` measures it, of LEAST_CALLS calls at least.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return Timing(*do_bench(call, warmup=milliseconds / 4, rep=milliseconds, quantiles=list(QUANTILES)))
    call()
    times: list[float] = []
    deadline = time.perf_counter() + milliseconds / 1e3
    while len(times) < LEAST_CALLS or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return Timing(*torch.tensor(times).quantile(torch.tensor(QUANTILES)).tolist())


def steady_clock(call: Callable[[], object], device: torch.device, *, milliseconds: float = 100) -> Timing:
    """As `clock`, measured again while the result is noisy: MOST_MEASUREMENTS times at most, and no more once they have
    taken MOST_TIME times `milliseconds`, as those of slow calls on a busy CPU do.

    Returns: the measurement with the smallest spread.
    """
    timings = []
    begun = time.perf_counter()
    for _ in range(MOST_MEASUREMENTS):
        timings.append(clock(call, device, milliseconds=milliseconds))
        if not timings[-1].is_noisy or time.perf_counter() - begun > MOST_TIME * milliseconds / 1e3:
            break
    return min(timings, key=lambda timing: timing.spread)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has computed what was launched. On a CPU nothing is left to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def requested_bytes(device: torch.device) -> int:
    """Allocated bytes of a GPU, without what the allocator rounds up, which depends on what was allocated before."""
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"]


def once(call: Callable[[], object]) -> float:
    """Milliseconds of a single call on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def host_microseconds(call: Callable[[], object]) -> float:
    """How long the host takes to launch a call's kernels, without waiting for them to finish: the median of 20."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def launches(call: Callable[[], object]) -> int:
    """How many kernels, copies and fills a call launches on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def copy_gb_per_s(device: torch.device) -> float:
    """Bytes that a large copy reads and writes, in units of 1e9 per second."""
    size = 2**29 if device.type == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / steady_clock(lambda: target.copy_(source), device).median / 1e6


def product_tflops(device: torch.device) -> float:
    """Floating-point operations of a large bf16 matrix product, in units of 1e12 per second."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * size**3 / steady_clock(lambda: a @ b, device).median / 1e9


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Captures the call in a CUDA graph and returns the function that replays the graph."""
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
