"""Forward and backward of a training step as one CUDA graph: one launch from the host instead of hundreds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Calls before a capture. The first calls compile, choose algorithms and allocate workspaces. In its first calls DDP
# also forms its buckets and times itself
# (https://docs.pytorch.org/docs/stable/notes/cuda.html#usage-with-distributeddataparallel).
WARMUP_CALLS, WARMUP_CALLS_OF_DDP = 2, 11
# The largest number of batch shapes. Each shape has its own graph, and all graphs share the memory for activations.
MOST_GRAPHS = 16

Inputs = Mapping[str, Tensor | None]
Shapes = tuple[tuple[int, ...] | None, ...]


class CaptureError(RuntimeError):
    """A loss cannot be captured; the message says why."""


@dataclass
class _Captured:
    """A captured graph.

    Attributes:
        inputs: the tensors that the graph reads.
        loss, gradients: the tensors that it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor | None]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedLoss:
    """Computes a loss and its gradients by replaying a CUDA graph, one for each shape of the inputs.

    The gradients are the graph's own tensors. After a call they are the `.grad` of the parameters. No other code may
    write to them between the pieces of a step. Only a capture waits for the device.

    Args:
        loss: a function of named tensors (some may be None) that returns a scalar. It must not read a tensor on the
            host.
        parameters: the parameters that get gradients.
        warmup_calls: calls before a capture.
    """

    def __init__(
        self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter], *, warmup_calls: int = WARMUP_CALLS
    ) -> None:
        self._loss, self._warmup_calls = loss, warmup_calls
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._captured: dict[Shapes, _Captured] = {}
        self._scale: Tensor | None = None
        self._summed: list[Tensor] | None = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, inputs: Inputs, *, scale: Tensor, first: bool = True, accumulates: bool = False) -> Tensor:
        """The loss of `inputs`, detached. The returned tensor is a copy that later calls do not overwrite.

        Args:
            scale: the factor on the gradients, a scalar on the device.
            first: whether the gradients replace those of the previous call. Otherwise they are added to them.
            accumulates: whether any call has first=False. It must be the same in all calls. If true, all graphs add to
                the same tensors. If false, each graph has its own tensors, which saves the addition.
        Raises: CaptureError if the loss cannot be captured, or if there are more shapes than MOST_GRAPHS. The gradients
            of earlier calls with first=False are then still those of the parameters.
        """
        if accumulates and self._summed is None:
            self._summed = [torch.zeros_like(parameter) for parameter in self._parameters]
        shapes = tuple(None if x is None else tuple(x.shape) for x in inputs.values())
        found = self._captured.get(shapes)
        if found is None:
            found = self._captured[shapes] = self._capture(inputs)
        for name, x in inputs.items():
            own = found.inputs[name]
            if x is not None and own is not None:
                own.copy_(x, non_blocking=True)
        assert self._scale is not None
        self._scale.copy_(scale)
        if first and self._summed is not None:
            torch._foreach_zero_(self._summed)
        found.graph.replay()
        self._give(found.gradients)
        return found.loss.clone()

    def _give(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _capture(self, inputs: Inputs) -> _Captured:
        if len(self._captured) == MOST_GRAPHS:
            raise CaptureError(f"batches have more than {MOST_GRAPHS} shapes")
        own = {name: None if x is None else x.clone() for name, x in inputs.items()}
        if self._scale is None:
            self._scale = torch.ones((), device=self._parameters[0].device)
        before = None if self._summed is None else [gradient.clone() for gradient in self._summed]
        try:
            return self._captured_of(own)
        except (RuntimeError, NotImplementedError) as error:
            raise CaptureError(" ".join(str(error).split())[:300]) from error
        finally:  # the warm-up calls have added to the gradients
            if before is not None and self._summed is not None:
                torch._foreach_copy_(self._summed, before)
                self._give(self._summed)

    def _captured_of(self, inputs: dict[str, Tensor | None]) -> _Captured:
        none: list[Tensor | None] = [None] * len(self._parameters)
        # torch.cuda.graph requires that the warm-up calls run on a side stream, as the capture does. One stream serves
        # all calls and captures, because the matrix-product library allocates a workspace per stream and keeps it.
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self._warmup_calls):
                self._give(self._summed or none)
                self._forward_backward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # The warm-up calls allocated outside the graphs' pool. What they left, gradients included, must be free now:
        # torch.cuda.graph then returns it to the device before the pool grows, so it is not reserved twice.
        self._give(self._summed or none)
        if self._pool is None:
            gc.collect()  # the first call may have compiled, which leaves tensors in reference cycles
        graph = torch.cuda.CUDAGraph()
        # "thread_local" allows other threads to use CUDA during the capture: a data loader's thread pins memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            loss = self._forward_backward(inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, loss, [parameter.grad for parameter in self._parameters])

    def _forward_backward(self, inputs: dict[str, Tensor | None]) -> Tensor:
        # Autocast caches casts of weights. A cast from outside the capture would be read, unchanged, in every replay.
        torch.clear_autocast_cache()
        assert self._scale is not None
        loss = self._loss(**inputs)
        (loss * self._scale).backward()
        torch.clear_autocast_cache()
        return loss.detach()
