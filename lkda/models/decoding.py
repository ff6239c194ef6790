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
from lkda.ops.gated_norm.op import EPS, gated_rms_norm
from lkda.ops.precision import at_least_float32
from lkda.ops.products.op import linear
from lkda.ops.rows.cpu import MOST_ROWS, NORM, SILU, TIMES, can_take, product_rows
from lkda.ops.token_linear.op import gains, normed_linear, takes

# Smaller matrices stay in a core's cache, where their layout makes no difference.
LARGE_BYTES = 2**19


def prepare_decoding(model: LanguageModel) -> LanguageModel:
    """A copy of `model` with the same parameters, whose steps are faster. A copy that is prepared is returned as it is.

    Layers of one input are one product. On a CPU it is C++, which reads the weights where they are. Elsewhere, and
    without a compiler, the weights are concatenated once, at the first step, and do not follow later changes of the
    model's. On a CPU they are then also transposed, which makes a product of one row in MKL twice as fast.
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
        weights = [layer.weight for layer in layers]
        if _in_rows(x, *weights):
            return product_rows(x, weights)
        key = tuple(id(layer) for layer in layers)
        if key not in self._products:
            self._products[key] = _product(weights)
        whole = self._products[key]
        if whole.dim() == 2:
            return linear(x, whole)
        if x.dim() > 2 and x.shape[-2] > 1:  # a prompt
            return torch.cat([linear(x, weight) for weight in weights], -1)
        halves = torch.bmm(x.reshape(1, -1, self.in_features).expand(2, -1, -1), whole)  # [2, B, out / 2]
        y = halves.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y[..., : sum(layer.out_features for layer in layers)]

    def of_heads(self, o: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
        if self.bias is None and _in_rows(o.flatten(1), self.weight, weight):
            return product_rows(o.flatten(1), [self.weight], form=NORM, norm=weight, eps=EPS, other=gate)
        gates = None if gate is None else gate.view_as(o).to(o.dtype)
        return self(gated_rms_norm(o, gates, weight).flatten(-2))

    def of_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.bias is None and _in_rows(gate, self.weight):
            return product_rows(gate, [self.weight], form=SILU, other=up)
        return self(F.silu(gate) * up)

    def of_product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.bias is None and _in_rows(a, self.weight):
            return product_rows(a, [self.weight], form=TIMES, other=b)
        return self(a * b)


def _in_rows(x: Tensor, *weights: Tensor) -> bool:
    return x.dim() == 2 and len(x) <= MOST_ROWS and can_take(x, *weights)


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
