"""A copy of a model that is prepared for decoding: the same weights, with matrix products for one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lkda.models.block import Block
from lkda.models.decoding_block import DecodingBlock
from lkda.models.linear import FusedLinear, Linear, has_hooks, is_plain
from lkda.models.lm import LanguageModel
from lkda.ops.precision import at_least_float32
from lkda.ops.token_linear.op import gains, normed_linear, takes

# Smaller matrices stay in a core's cache, where their layout makes no difference.
LARGE_BYTES = 2**19


def prepare_decoding(model: LanguageModel) -> LanguageModel:
    """A copy of `model` with the same parameters, whose steps are faster. A copy that is prepared is returned as it is.

    Layers of one input are one product, whose weights are concatenated once, at the first step. On a CPU they are also
    transposed, which makes the product of one row twice as fast. They do not follow later changes of the model's.
    """
    if isinstance(model.lm_head, DecodingLinear):
        return model
    prepared = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    if gains(model.embed_tokens.weight):
        _use_few_launches(prepared, torch.float32)
    for module in list(prepared.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Linear) and not has_hooks(child):
                setattr(module, name, DecodingLinear(child))
    return prepared.eval()


@torch.no_grad()
def _use_few_launches(model: LanguageModel, dtype: torch.dtype) -> None:
    """Replace the blocks by `DecodingBlock`s, and vectors that the kernels take in `dtype` by copies of that dtype."""
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        model.blocks[i] = DecodingBlock(block)
        for module, name in (
            (block.mixer, "A_log"),
            (block.mixer, "dt_bias"),
            (block.mixer, "decay_bias"),
            (getattr(block.mixer, "o_norm", None), "weight"),
        ):
            vector = getattr(module, name, None)
            if vector is not None:
                setattr(module, name, nn.Parameter(vector.to(dtype), requires_grad=False))
    if is_plain(model.lm_head) and type(model.norm) is nn.RMSNorm and not has_hooks(model.norm):
        model.lm_head = NormedHead(model.norm, model.lm_head)  # type: ignore[assignment]
        model.norm = nn.Identity()  # type: ignore[assignment]


class DecodingLinear(nn.Linear, FusedLinear):
    """A linear layer with the parameters of another, and the products that it takes part in as the first layer."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._products: dict[tuple[int, ...], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.joined(x, [self])
        return y if self.bias is None else y + self.bias

    def joined(self, x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
        key = tuple(id(layer) for layer in layers)
        if key not in self._products:
            self._products[key] = _product([layer.weight for layer in layers])
        weight = self._products[key]
        if weight.dim() == 2:
            return F.linear(x, weight)
        if x.dim() > 2 and x.shape[-2] > 1:  # a prompt
            return torch.cat([F.linear(x, layer.weight) for layer in layers], -1)
        halves = torch.bmm(x.reshape(1, -1, self.in_features).expand(2, -1, -1), weight)  # [2, B, out / 2]
        y = halves.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y[..., : sum(layer.out_features for layer in layers)]


def _product(weights: Sequence[Tensor]) -> Tensor:
    """The concatenated weights [out, in]; large ones on a CPU transposed and in halves [2, in, out / 2], for two
    threads."""
    weight = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
    small = weight.numel() * weight.element_size() < LARGE_BYTES
    if small or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return weight
    weight = F.pad(weight, (0, 0, 0, len(weight) % 2))
    return weight.view(2, -1, weight.shape[1]).transpose(1, 2).contiguous()


class NormedHead(DecodingLinear):
    """The head together with the norm before it."""

    def __init__(self, norm: nn.RMSNorm, head: nn.Linear) -> None:
        super().__init__(head)
        self.norm, self._scale = norm, at_least_float32(norm.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 2:
            return super().forward(self.norm(x))
        assert self.norm.eps is not None
        return normed_linear(x, self._scale if takes(x) else self.norm.weight, self.weight, eps=self.norm.eps)
