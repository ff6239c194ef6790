"""Forward and backward of a training step as one CUDA graph: one launch of the host instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Calls before a capture: the first ones compile, choose algorithms and make workspaces.
WARMUP_CALLS = 3
# Batches of more shapes than that run without a graph: each graph keeps its own activations.
MOST_GRAPHS = 4

Inputs = Mapping[str, Tensor | None]
Shape = tuple[tuple[str, tuple[int, ...] | None], ...]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor | None]
    loss: Tensor
    gradients: list[Tensor | None]


class GraphedLoss:
    """Computes a loss and its gradients, replaying one CUDA graph for each shape of the inputs.

    The gradients are tensors of this object, which `parameters` have as their `.grad` after a call: nobody else may
    write to them between the pieces of a step. All work is on the current stream, and nothing waits for the device.

    Args:
        loss: of named tensors (None where there is none), a scalar; the same work at each call of the same shapes.
        parameters: that require gradients.
        accumulates: whether steps have several pieces. Gradients are then added to tensors that all graphs share;
            otherwise each graph has its own, which saves the addition.
    """

    def __init__(
        self, loss: Callable[..., Tensor], parameters: Sequence[nn.Parameter], *, accumulates: bool = False
    ) -> None:
        self._loss = loss
        self._parameters = list(parameters)
        self._captured: dict[Shape, _Captured] = {}
        self._scale = torch.ones((), device=self._parameters[0].device)
        self._shared = [torch.zeros_like(parameter) for parameter in parameters] if accumulates else None
        self._pool: tuple[int, int] | None = None

    def __call__(self, inputs: Inputs, *, scale: Tensor | float = 1.0, first: bool = True) -> Tensor:
        """The loss, detached and the caller's own, of `inputs`.

        Args:
            scale: what the gradients are multiplied by, a number or a scalar on the device.
            first: whether the gradients replace those of the call before; they are added otherwise.
        """
        shape = tuple((name, None if x is None else tuple(x.shape)) for name, x in inputs.items())
        found = self._captured.get(shape)
        if found is None:
            found = self._captured[shape] = self._capture(inputs)
        for name, value in inputs.items():
            if value is not None:
                found.inputs[name].copy_(value, non_blocking=True)  # type: ignore[union-attr]
        if isinstance(scale, Tensor):
            self._scale.copy_(scale)
        else:
            self._scale.fill_(scale)
        if first and self._shared is not None:
            torch._foreach_zero_(self._shared)
        found.graph.replay()
        self._give(found.gradients)
        return found.loss.clone()

    def _give(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient

    def _capture(self, inputs: Inputs) -> _Captured:
        own = {name: None if x is None else x.clone() for name, x in inputs.items()}
        none: list[Tensor | None] = [None] * len(self._parameters)
        before = None if self._shared is None else [gradient.clone() for gradient in self._shared]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_CALLS):
                self._give(self._shared or none)
                self._forward_backward(own)
        torch.cuda.current_stream().wait_stream(stream)
        self._give(self._shared or none)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using CUDA meanwhile: a data loader pins its batches.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._forward_backward(own)
        self._pool = self._pool or graph.pool()
        if before is not None and self._shared is not None:
            torch._foreach_copy_(self._shared, before)
        return _Captured(graph, own, loss, [parameter.grad for parameter in self._parameters])

    def _forward_backward(self, inputs: Inputs) -> Tensor:
        # A weight's cast that autocast had cached outside would be read in every replay as it was then.
        torch.clear_autocast_cache()
        loss = self._loss(**inputs)
        (loss * self._scale).backward()
        torch.clear_autocast_cache()
        return loss.detach()
