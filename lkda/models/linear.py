"""Linear layers without biases. Layers of one input are one matrix product of their concatenated weights.

These layers stay separate modules, so that their weights keep their names and their shapes in checkpoints, exports and
optimizers. Only the forward concatenates. Forward and backward then have one product instead of one per layer, and the
gradients of the weights are slices of one matrix. If one of the layers has been replaced by a module of another class,
such as a LoRA adapter, or has a hook, each layer is called by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkda.ops import linear

# Inputs of fewer tokens, as in decoding, are multiplied layer by layer. The time of such a product is that of reading
# the weights, which a concatenation would read and write once more.
FEWEST_TOKENS = 256
# The concatenated weights are padded with zeros to a multiple of this number of outputs. A row of outputs in half
# precision is then a multiple of 16 bytes, which fast matrix products and the kernels of the operators need.
MULTIPLE = 8


class Linear(nn.Linear):
    """A linear layer without a bias, whose products run in the library that is fastest for them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class FusedLinear(ABC):
    """A layer that computes the layers of one input itself. `lkda.models.decoding` has such layers."""

    @abstractmethod
    def joined(self, x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
        """`joined_linear` of these layers, of which it is the first."""

    @abstractmethod
    def of_heads(self, o: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
        """Its output for `gated_rms_norm` of o [B, H, D], with the heads side by side; gate [B, H * D]."""

    @abstractmethod
    def of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """Its output for SiLU(gate) times up, [B, in_features] each."""

    @abstractmethod
    def of_product(self, a: Tensor, b: Tensor) -> Tensor:
        """Its output for a times b, [B, in_features] each."""


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is the product with its weight and nothing else, so that the call may be replaced."""
    return (
        (isinstance(layer, FusedLinear) or type(layer) in (nn.Linear, Linear))
        and layer.bias is None
        and not has_hooks(layer)
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether the layer has a hook of PyTorch's, or a forward of its own, which run only if the layer is called.

    Packages such as accelerate replace the forward of a layer by one that moves its weights to the device first.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in layer.__dict__


def fused_linear(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """The output of each layer, [..., out_features]. Where x has many tokens, they are views of one tensor.

    Args:
        x: [..., in_features].
        layers: the layers, or modules that have taken their places.
    """
    if len(layers) < 2 or not all(map(is_plain, layers)):
        return tuple(layer(x) for layer in layers)
    if isinstance(layers[0], FusedLinear):
        return layers[0].joined(x, layers).split([layer.out_features for layer in layers], -1)
    if _has_few_tokens(x):
        return tuple(layer(x) for layer in layers)
    sizes = [layer.out_features for layer in layers]
    weights = [layer.weight for layer in layers]
    padding = -sum(sizes) % MULTIPLE
    if padding:
        weights.append(weights[0].new_zeros(padding, x.shape[-1]))
        sizes.append(padding)
    return linear(x, torch.cat(weights)).split(sizes, -1)[: len(layers)]


def joined_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """As `fused_linear`, but with the outputs side by side in one tensor [..., sum of out_features]."""
    plain = all(map(is_plain, layers))
    if plain and isinstance(layers[0], FusedLinear):
        return layers[0].joined(x, layers)
    if not plain or _has_few_tokens(x):
        return torch.cat([layer(x) for layer in layers], -1)
    return linear(x, torch.cat([layer.weight for layer in layers]))


def _has_few_tokens(x: Tensor) -> bool:
    return x.numel() < FEWEST_TOKENS * x.shape[-1]
