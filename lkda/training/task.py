"""The LightningModule: next-token prediction with any model that `build_model` makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lkda.models.build import build_model
from lkda.ops.cross_entropy.op import linear_cross_entropies, linear_cross_entropy
from lkda.training.accuracy import PartMetrics
from lkda.training.cuda_graphs import GraphedLoss
from lkda.training.old_checkpoint import current_optimizer_state
from lkda.training.optimizer import build_optimizer, learning_rate_factor
from lkda.training.positions import PositionLoss
from lkda.training.step_mean import StepMean

# {tokens [B, T], targets [B, T], cu_seqlens [N + 1] or None}, and where few targets ask: their flat places, asked [N],
# and the number of the batch's part.
Batch = Mapping[str, Any]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets that are asked, in float32.

    Args:
        logits: [B, T, vocab].
        targets: [B, T] int64; -100 where nothing is asked.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each target, [B, T], in float32; 0 where nothing is asked. Arguments as of `next_token_loss`."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(targets)


class LanguageModelTask(L.LightningModule):
    """Trains a language model and measures it.

    Logged: train/loss, the mean over every target of an optimiser step, at the last of its batches, and
    train/grad_norm, of the step's gradient before clipping; val/loss, the mean over every validation target (not over
    batches, whose numbers of targets differ), and by position (`PositionLoss`); bits per byte beside both losses where
    the tokens are text. Where the validation has parts: what `PartMetrics` computes.

    Args:
        model_config: what `build_model` takes: plain names and numbers.
        optimizer: what `build_optimizer` takes.
        scheduler: what `learning_rate_factor` takes.
        total_steps: optimiser steps of the whole run, for the schedule.
        context: tokens of a sequence, at most.
        bytes_per_token: of the validation text; divides nats a token into bits a byte. None where it is no text.
        parts: of the validation; see `lkda.training.accuracy`.
        compile: whether `torch.compile` takes the model and its loss.

    Attributes:
        clipped_steps: how many optimiser steps of this process had a gradient norm above the limit.
    """

    clipped_steps: Tensor

    def __init__(
        self,
        model_config: dict[str, Any],
        *,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        total_steps: int,
        context: int,
        bytes_per_token: float | None,
        parts: Sequence[Mapping[str, int]] = (),
        compile: bool = False,
        graphs: bool = False,
    ) -> None:
        super().__init__()
        self.model = build_model(model_config)
        self.optimizer_config = dict(optimizer)
        self.scheduler_config = dict(scheduler)
        self.total_steps = total_steps
        self.bytes_per_token = bytes_per_token
        self.register_buffer("clipped_steps", torch.zeros((), dtype=torch.long), persistent=False)
        self.step_mean = StepMean()
        self.val_mean = MeanMetric()
        self.val_positions = PositionLoss(context)
        self.val_parts = PartMetrics(parts, vocab_size=self.model.config["vocab_size"]) if parts else None
        self._loss = torch.compile(self._eager_loss, dynamic=False) if compile else self._eager_loss
        self._graphs, self._graphed = graphs, None
        self._losses = torch.compile(self._eager_losses, dynamic=False) if compile else self._eager_losses

    def _eager_loss(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None, asked: Tensor | None = None
    ) -> Tensor:
        if asked is None and tokens.is_cuda:
            return linear_cross_entropy(*self._head_inputs(tokens, cu_seqlens), targets.flatten())
        if asked is None:
            return next_token_loss(self.model(tokens, cu_seqlens=cu_seqlens), targets)
        logits = self.model.logits_at(tokens, asked, cu_seqlens=cu_seqlens)
        return F.cross_entropy(logits.float(), targets.flatten()[asked])

    def _eager_losses(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        if tokens.is_cuda:
            losses = linear_cross_entropies(*self._head_inputs(tokens, cu_seqlens), targets.flatten())
            return losses.view_as(targets)
        return next_token_losses(self.model(tokens, cu_seqlens=cu_seqlens), targets)

    def _head_inputs(self, tokens: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the head reads, [N, d_model], in the type of its product, and its weight."""
        x = self.model.hidden(tokens, cu_seqlens=cu_seqlens).flatten(0, 1)
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return x.to(kind), self.model.lm_head.weight

    def _with_bits(self, name: str, loss: Tensor) -> dict[str, Tensor]:
        """The loss in nats a token, and in bits a byte, which compares across tokenizers, where the tokens are text."""
        bits = {} if self.bytes_per_token is None else {"bits_per_byte": loss / (math.log(2) * self.bytes_per_token)}
        return {f"{name}/{key}": value for key, value in {"loss": loss, **bits}.items()}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Sets the learning rate of the step that this batch belongs to: a function of the step and the settings, not
        of what a checkpoint holds, so that a run that goes on with more steps has the rates of the longer run."""
        step = self.trainer.global_step
        factor = learning_rate_factor(self.scheduler_config, step=step, total_steps=self.total_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimizer_config["lr"] * group["lr_scale"] * factor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        pieces = self.trainer.accumulate_grad_batches
        if self._graphs:
            if self._graphed is None:
                self._graphed = GraphedLoss(self._loss, list(self.model.parameters()), accumulates=pieces > 1)
            inputs = {name: batch.get(name) for name in ("tokens", "targets", "cu_seqlens", "asked")}
            loss = self._graphed(inputs, scale=1.0 / pieces, first=batch_idx % pieces == 0)
            self.log_dict(self._with_bits("train", loss), logger=False)
            return loss
        mean = loss = self._loss(batch["tokens"], batch["targets"], batch["cu_seqlens"], batch.get("asked"))
        if pieces > 1:
            loss = self.step_mean.weighted(loss, batch["targets"], first=batch_idx % pieces == 0)
            mean = self.step_mean.loss
        self.log_dict(self._with_bits("train", mean.detach()), logger=False)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._graphs:
            loss.backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self._graphs:
            optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pieces = self.trainer.accumulate_grad_batches
        if pieces > 1:
            self.step_mean.normalize(self.parameters(), pieces=pieces)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.val_parts is not None:
            self.val_parts.measure(self.model, batch)
            return
        targets: Tensor = batch["targets"]
        losses = self._losses(batch["tokens"], targets, batch["cu_seqlens"])
        asked = (targets != -100).sum()
        self.val_mean.update(losses.sum() / asked, weight=asked)
        self.val_positions.update(losses, targets, batch["cu_seqlens"])

    def on_validation_epoch_end(self) -> None:
        if self.val_parts is not None:
            self.log_dict(self.val_parts.compute(), logger=False)
            return
        loss = self.val_mean.compute()
        self.val_mean.reset()
        by_position = self.val_positions.compute()
        self.log_dict(self._with_bits("val", loss) | by_position, logger=False)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the norm over all parameters. Lightning's own refuses a fused optimiser under mixed precision: such a
        one would unscale the gradients after the clipping. `configure_optimizers` uses none where there is a scale.
        """
        limit = gradient_clip_val or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), limit)
        self.log("train/grad_norm", norm, logger=False)
        self.clipped_steps += norm > limit

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("optimizer_states", [])
        checkpoint["optimizer_states"] = [current_optimizer_state(state, self.model) for state in states]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # float16 scales the loss. A fused optimiser would divide the scale out in its step; of any other, Lightning
        # unscales the gradients first, and clipping sees their true size.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return build_optimizer(self.model, self.optimizer_config, fused=not scaled)
