"""The loss of next-token prediction: cross-entropy in nats, in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lkda.checks import InputError
from lkda.models.block import Block
from lkda.models.linear import is_plain
from lkda.models.lm import ApplyBlock, LanguageModel, apply_block
from lkda.models.mixer import Mixer, State
from lkda.ops.cross_entropy.op import linear_cross_entropies, linear_cross_entropy
from lkda.targets import IGNORE_INDEX

# The values of the option `checkpointing`.
CHECKPOINTING = ("none", "block")

_MOST_COMPILATIONS = 1024


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean loss over all targets that are not IGNORE_INDEX, a scalar in nats per token.

    Args:
        logits: [B, T, vocab].
        targets: [B, T] int64.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target, [B, T] in nats; 0 where the target is IGNORE_INDEX. Arguments as in
    `next_token_loss`."""
    flat = targets.flatten()
    losses = F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view_as(targets)


class ModelLoss:
    """The losses of a model's predictions. On a GPU the logits are computed for a part of the tokens at a time.

    Args:
        model: the model to train.
        compile: whether to compile its blocks with `torch.compile`. Blocks of one kind share one compilation, so the
            first step compiles only one block of each kind instead of the whole model.
        checkpointing: "block" keeps only the input of each block for the backward pass, which computes the block again.
            "none" keeps what the backward pass needs.
        shares_weights: whether a block's weights are gathered when it is called (FSDP).
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        compile: bool = False,
        checkpointing: str = "none",
        shares_weights: bool = False,
    ) -> None:
        if checkpointing not in CHECKPOINTING:
            raise InputError(f"checkpointing must be {' or '.join(CHECKPOINTING)}, got {checkpointing!r}.")
        self.model, self.checkpointing = model, checkpointing
        for module in model.modules():
            if isinstance(module, Mixer):
                module.recomputes = checkpointing == "none"
        apply: ApplyBlock = apply_block
        if compile:
            _allow_many_compilations()
        if compile and shares_weights:
            _compile_inside(model)
        elif compile:
            apply = torch.compile(apply_block, dynamic=False, backend=keeps_less)
        self.apply = _recomputing(apply) if checkpointing == "block" else apply

    def uncompiled(self) -> ModelLoss:
        """The same losses without `torch.compile`."""
        return ModelLoss(self.model, checkpointing=self.checkpointing)

    def mean(
        self,
        tokens: Tensor,
        targets: Tensor,
        cu_seqlens: Tensor | None = None,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """The mean loss over all targets that are not IGNORE_INDEX, a scalar in nats per token.

        Args:
            tokens, targets: [B, T] int64.
            cu_seqlens: [N + 1], bounds of the sequences that are packed in one row.
            target_positions: [M], positions of the targets in the flattened batch. Given if there are few targets.
        """
        x = self._hidden(tokens, cu_seqlens)
        if target_positions is not None:
            targets = targets.flatten()[target_positions].unsqueeze(0)
            x = x.flatten(0, 1).index_select(0, target_positions).unsqueeze(0)
        if is_plain(self.model.lm_head) and (x.is_cuda or not torch.is_autocast_enabled("cpu")):
            return linear_cross_entropy(_as_multiplied(x), self.model.lm_head.weight, targets.flatten())
        return next_token_loss(self.model.lm_head(x), targets)

    def each(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The loss of each target, [B, T] in nats; 0 where the target is IGNORE_INDEX. On a GPU it has no gradient."""
        x = self._hidden(tokens, cu_seqlens)
        if x.is_cuda and is_plain(self.model.lm_head):
            losses = linear_cross_entropies(_as_multiplied(x), self.model.lm_head.weight, targets.flatten())
            return losses.view_as(targets)
        return next_token_losses(self.model.lm_head(x), targets)

    def _hidden(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return self.model.hidden_by(self.apply, tokens, cu_seqlens=cu_seqlens)


class MeanLoss(nn.Module):
    """`ModelLoss.mean` as a module, which DDP can wrap.

    Attributes:
        loss: the `ModelLoss`.
    """

    def __init__(self, loss: ModelLoss) -> None:
        super().__init__()
        self.model, self.loss = loss.model, loss

    def forward(self, **inputs: Tensor | None) -> Tensor:
        """As `ModelLoss.mean`."""
        return self.loss.mean(**inputs)  # type: ignore[arg-type]


def _allow_many_compilations() -> None:
    """Raises the limit of compilations of one function in this process, 8 by default, beyond which it runs uncompiled.

    There is one for each kind of block and each shape of a batch, over all runs of a sweep.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MOST_COMPILATIONS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _MOST_COMPILATIONS)


def is_of_compiler(error: BaseException | None) -> bool:
    """Whether `torch.compile` raised the error, such as where it finds no C++ compiler."""
    from torch._dynamo.exc import TorchDynamoException  # the import takes seconds, which a run without it saves

    return isinstance(error, TorchDynamoException)


def keeps_less(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """The default backend of `torch.compile`, with a partition that keeps less between forward and backward.

    By default the partition also keeps a cheap element-wise result if a matrix product of the backward pass reads it.
    Computing such a result again takes one pass over memory, and a block then keeps about a sixth less. The setting is
    changed only during this compilation, so that other compilations in the process keep theirs.
    """
    from torch._dynamo import lookup_backend  # these imports take seconds, which a run without compilation saves
    from torch._functorch import config

    # Inductor chooses the sizes of its reductions by timing them, which can change the order of a sum between runs.
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    inductor: Callable[..., Callable[..., Any]] = lookup_backend("inductor")
    with config.patch(ban_recompute_materialized_backward=False):
        return inductor(graph, inputs, config_patches=options)


def _compile_inside(model: LanguageModel) -> None:
    """Compile what the blocks compute, but not what is done before and after it, such as gathering their weights."""
    compiled = torch.compile(_forward_of_block, dynamic=False, backend=keeps_less)

    def forward(block: Block, x: Tensor, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State]:
        return compiled(block, x, cu_seqlens), ()

    for block in model.blocks:
        assert isinstance(block, Block)
        block.forward = partial(forward, block)  # type: ignore[method-assign]


def _forward_of_block(block: Block, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return Block.forward(block, x, cu_seqlens=cu_seqlens)[0]


def _recomputing(apply: ApplyBlock) -> ApplyBlock:
    """`apply`, which runs again in the backward pass instead of keeping its intermediate results."""

    def recomputing(block: nn.Module, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        # Blocks draw no random numbers. To save and restore a generator would wait for the device, which a CUDA graph
        # cannot capture.
        y: Tensor = checkpoint(apply, block, x, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
        return y

    return recomputing


def _as_multiplied(x: Tensor) -> Tensor:
    """x [B, T, d_model] as [B * T, d_model], in the data type that a linear layer would compute in."""
    x = x.flatten(0, 1)
    return x.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else x
