"""Where the time of a training step goes: the kernels that torch.profiler sees, sorted into classes by their names.

A class is all that a name tells. A replayed CUDA graph keeps the names of its kernels, but not the modules that
launched them, so the matrix products of projections, feed-forward layers and the head are one class.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OPERATOR, CONVOLUTION, NORMS, LOSS = "operator", "convolution", "norms", "loss"
OPTIMIZER, PRODUCTS, ELEMENTWISE = "optimizer", "matrix products", "element-wise"
CLASSES = (PRODUCTS, OPERATOR, CONVOLUTION, NORMS, LOSS, OPTIMIZER, ELEMENTWISE)

# The first expression that occurs in a kernel's name gives its class. What fits none is element-wise: casts, sums,
# activations, embeddings, copies. The names are those of lkda/ops, of PyTorch and its compiler, of cuBLAS and cuDNN, of
# flash-linear-attention, and of PyTorch's operators on a CPU, aten::*.
_TABLE = (
    (
        OPERATOR,
        r"^kda_|^simplified_|flash|fmha|sdpa|attention|softmax_warp|"
        r"kda|chunk_(?!cat)|delta_rule|wy_|solve_tril|inverse_kernel|cumsum|l2norm",
    ),
    (CONVOLUTION, r"short_conv|causal_conv|conv1d|depthwise|convolution"),
    (LOSS, r"cross_entropy|nll_loss|log_?softmax|softmax|logsumexp"),
    (
        OPTIMIZER,
        r"multi_tensor|adam|foreach|lp_?norm|aten::_?(fused_adamw?|foreach_\w+|linalg_vector_norm|clip_grad)|newton",
    ),
    (NORMS, r"rms_?norm|layer_?norm|gammabeta|(gated|residual)_norm|column_sums|rsqrt|div_mul_pow|mul_pow_sum|pow_sum"),
    (
        PRODUCTS,
        r"gemm|gemv|nvjet|cutlass|cublas|splitk|wgmma|xmma|triton_(tem|mm|bmm)|"
        r"aten::(mm|bmm|addmm|addbmm|baddbmm|matmul|linear|dot|mv)$",
    ),
)
_EXPRESSIONS = tuple((name, re.compile(expression, re.IGNORECASE)) for name, expression in _TABLE)
# What the profiler reports beside kernels: spans that cover several of them, waiting, and its own work.
_SPANS = re.compile(
    r"^(ProfilerStep|Optimizer\.|## |Torch-Compiled|CompiledFunction|Inductor:|autograd::engine|Pregraph|"
    r"TorchDynamo|AOTDispatcher|\[pl\]|\[Strategy\]|\[LightningModule\]|\[Callback\]|nccl:|"
    r"(Stream|Event|Context|Device) Sync|Stream Wait|Activity Buffer|Buffer Flush|Instrumentation|Command Buffer)"
)
MOST_KERNELS = 40


def kernel_class(name: str) -> str:
    """The class of the kernel, or of the CPU operator, with that name."""
    return next((found for found, expression in _EXPRESSIONS if expression.search(name)), ELEMENTWISE)


@dataclass(frozen=True)
class Event:
    """A kernel on a GPU, or an operator on a CPU.

    Attributes:
        start, end: in microseconds.
        own: microseconds without those of other events inside it.
    """

    name: str
    start: float
    end: float
    own: float


def profiler(device: torch.device) -> profile:
    """A profiler of what the device does."""
    return profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])


def events_of(finished: profile, device: torch.device) -> list[Event]:
    """The kernels, copies and fills of a GPU; the operators of a CPU."""
    gpu = device.type == "cuda"
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = []
    for event in finished.events() or ():
        if event.device_type != wanted or _SPANS.search(event.name) or getattr(event, "is_user_annotation", False):
            continue
        start, end = float(event.time_range.start), float(event.time_range.end)
        events.append(Event(event.name, start, end, end - start if gpu else float(event.self_cpu_time_total)))
    return events


def busy(events: Iterable[Event]) -> float:
    """The microseconds in which at least one event runs."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((event.start, event.end) for event in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def breakdown(events: Sequence[Event], *, steps: int, step_ms: float) -> dict[str, Any]:
    """Where the time of a step goes.

    Args:
        steps: the number of optimizer steps that were profiled.
        step_ms: milliseconds of a step without the profiler, which slows the host.
    Returns: {"ms": milliseconds of a step by class, "busy_ms", "idle_share", "launches" of a step, "kernels": the
        MOST_KERNELS kernels that take longest, each {"name", "class", "ms", "calls"} of a step}. idle_share is the
        share of the step in which the device waits.
    Raises: RuntimeError if there are no events.
    """
    if not events:
        raise RuntimeError("the profiler reported no kernels")
    own: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        own[event.name] += event.own / 1000 / steps
        calls[event.name] += 1
    by_class = dict.fromkeys(CLASSES, 0.0)
    for name, ms in own.items():
        by_class[kernel_class(name)] += ms
    busy_ms = busy(events) / 1000 / steps
    longest = sorted(own, key=own.__getitem__, reverse=True)[:MOST_KERNELS]
    return {
        "ms": {name: round(ms, 4) for name, ms in by_class.items()},
        "busy_ms": round(busy_ms, 4),
        "idle_share": round(max(0.0, 1 - busy_ms / step_ms), 4),
        "launches": round(len(events) / steps, 1),
        "kernels": [
            {"name": name[:200], "class": kernel_class(name), "ms": round(own[name], 4), "calls": calls[name] / steps}
            for name in longest
        ],
    }
