"""Forward and backward of a training step as one CUDA graph: one launch of the host instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Calls before a capture: the first ones compile, choose algorithms and make workspaces.
WARMUP_CALLS = 2
# Shapes of batches, each of which has a graph; all of them share the memory of activations.
MOST_GRAPHS = 16

Inputs = Mapping[str, Tensor | None]
Shapes = tuple[tuple[int, ...] | None, ...]


class CaptureError(RuntimeError):
    """A loss cannot be captured; the message says why."""


@dataclass
class _Captured:
    """
    Attributes:
        inputs: what the graph reads.
        loss, gradients: what it writes.
    """

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor | None]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedLoss:
    """Computes a loss and its gradients by replaying a CUDA graph, one for each shape of the inputs.

    The gradients are the graph's own tensors, which the parameters have as their `.grad` after a call; between the
    pieces of a step nobody else may write to them. Nothing here waits for the device, but for a capture.

    Args:
        loss: of named tensors (None where there is none), a scalar. It must not read a tensor on the host.
        parameters: that have gradients.
    """

    def __init__(self, loss: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._loss = loss
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._captured: dict[Shapes, _Captured] = {}
        self._scale: Tensor | None = None
        self._summed: list[Tensor] | None = None
        self._pool: Any = None

    def __call__(self, inputs: Inputs, *, scale: Tensor, first: bool = True, accumulates: bool = False) -> Tensor:
        """The loss of `inputs`, detached, the caller's own.

        Args:
            scale: what the gradients are multiplied by, a scalar on the device.
            first: whether the gradients replace those of the call before; they are added to them otherwise.
            accumulates: the same in all calls: whether there are calls that are not the first. All graphs then add to
                the same tensors; otherwise each has its own, which saves the addition.
        Raises:
            CaptureError: the loss cannot be captured, or there are more shapes than MOST_GRAPHS.
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
            captured = self._captured_of(own)
        except (RuntimeError, NotImplementedError) as error:
            raise CaptureError(" ".join(str(error).split())[:300]) from error
        if before is not None and self._summed is not None:
            torch._foreach_copy_(self._summed, before)
        return captured

    def _captured_of(self, inputs: dict[str, Tensor | None]) -> _Captured:
        none: list[Tensor | None] = [None] * len(self._parameters)
        # As torch.cuda.graph wants it: the calls before run beside the current stream, as the capture will.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._give(self._summed or none)
                self._forward_backward(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._give(self._summed or none)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: that of a data loader pins memory.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._forward_backward(inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, loss, [parameter.grad for parameter in self._parameters])

    def _forward_backward(self, inputs: dict[str, Tensor | None]) -> Tensor:
        # Autocast keeps casts of weights; one that was made outside a capture would be read in every replay.
        torch.clear_autocast_cache()
        assert self._scale is not None
        loss = self._loss(**inputs)
        (loss * self._scale).backward()
        torch.clear_autocast_cache()
        return loss.detach()
