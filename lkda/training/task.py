"""The LightningModule: next-token prediction with any model that `build_model` returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from rich import get_console
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lkda.checks import InputError
from lkda.models.lm import LanguageModel
from lkda.models.mixer import Mixer
from lkda.models.sequence_part import SequencePart
from lkda.training.cuda_graphs import WARMUP_CALLS, WARMUP_CALLS_OF_DDP, CaptureError, GraphedLoss
from lkda.training.losses import MeanLoss, ModelLoss, is_of_compiler
from lkda.training.old_checkpoint import current_optimizer_state
from lkda.training.optimizer import build_optimizer, learning_rate_factor
from lkda.training.processes import local, process_count, process_count_of
from lkda.training.step_mean import StepMean
from lkda.training.strategies import share_weights
from lkda.training.validation import Batch, ValidationMetrics, with_bits

# The entries of a batch that the loss depends on. The last two say which part of its rows it is.
INPUTS = ("tokens", "targets", "cu_seqlens", "target_positions", "before", "documents")


class Loader(Protocol):
    """An iterable of batches with a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class LanguageModelTask(L.LightningModule):
    """Trains a language model and measures it.

    For a validation it logs what `ValidationMetrics` computes, and after the last step of the run the same for the test
    split, if there is one. What it measures at a step is in `step_metrics` instead, because Lightning's `log` takes
    0.3 ms for a value, which is much of a small model's step on a GPU.

    Args:
        model: the model to train.
        optimizer: what `build_optimizer` takes.
        scheduler: what `learning_rate_factor` takes.
        total_steps: optimizer steps of the whole run, for the schedule.
        context: the largest number of tokens in a sequence.
        bytes_per_token: of the validation text; it converts nats per token to bits per byte. None if the tokens are not
            text.
        val_subsets: of the validation; see `lkda.training.accuracy`.
        test_batches, test_bytes_per_token: of the test split, which is text; None if there is no test split.
        compile: whether to compile the model's blocks with `torch.compile`. "auto": as long as it can compile them.
        skips_bad_steps: whether a step whose loss or gradient norm is not finite leaves the weights and the optimizer
            as they were. Its batch counts as seen. The optimizer must take `found_inf`: a fused AdamW or Muon.
        checkpointing: "none", or "block" to keep only the input of each block for the backward pass.
        cuda_graphs: whether to replay forward and backward as CUDA graphs, as long as they can be captured.
        context_group, context_number: the processes that divide each row among themselves, and the number of this
            one's part. A batch then has the entries of `lkda.training.shares.part_of`. None: no process divides a row.
        shares_weights: whether the devices share the weights. The trainer's strategy must be a `ShardedStrategy`.

    Attributes:
        step_metrics: of the last batch of an optimizer step. train/loss: the mean over all targets of the step, in nats
            per token. train/bits_per_byte: the same, if the tokens are text. train/grad_norm: the norm of the step's
            gradient before clipping.
        clipped_steps: the number of optimizer steps of this process whose gradient norm was above the limit.
        skipped_steps, skipped_in_a_row: the number of skipped steps of this process, and of those since the last step
            that was not skipped.
    """

    clipped_steps: Tensor
    skipped_steps: Tensor
    skipped_in_a_row: Tensor

    def __init__(
        self,
        model: LanguageModel,
        *,
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        total_steps: int,
        context: int,
        bytes_per_token: float | None,
        val_subsets: Sequence[Mapping[str, int]] = (),
        test_batches: Loader | None = None,
        test_bytes_per_token: float | None = None,
        compile: bool | str = False,
        checkpointing: str = "none",
        skips_bad_steps: bool = False,
        cuda_graphs: bool = False,
        shares_weights: bool = False,
        context_group: Any = None,
        context_number: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = dict(optimizer)
        self.scheduler_config = dict(scheduler)
        self.total_steps = total_steps
        self.bytes_per_token = bytes_per_token
        self.register_buffer("clipped_steps", torch.zeros((), dtype=torch.long), persistent=False)
        for name in ("skipped_steps", "skipped_in_a_row"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long), persistent=False)
        self.skips_bad_steps = skips_bad_steps
        self.step_metrics: dict[str, Tensor] = {}
        self.step_mean = StepMean()
        rows = model.config["vocab_size"]
        self.validation = ValidationMetrics(
            context=context, vocab_size=rows, bytes_per_token=bytes_per_token, val_subsets=val_subsets
        )
        self.test_batches = test_batches
        self.test = ValidationMetrics(
            context=context, vocab_size=rows, bytes_per_token=test_bytes_per_token, split="test"
        )
        for module in model.modules():
            if isinstance(module, Mixer):
                module.longest_sequence = context
        self._compile = compile
        self.loss = ModelLoss(model, compile=bool(compile), checkpointing=checkpointing, shares_weights=shares_weights)
        self.cuda_graphs = cuda_graphs
        self._graphs: GraphedLoss | None = None
        # The loss that DDP wraps; none on one device. It is in a list, because a submodule would be saved.
        self._averaged: list[Any] = []
        self.shares_weights = shares_weights
        self.context_group, self.context_number = context_group, context_number

    @property
    def replays_graphs(self) -> bool:
        """Whether forward and backward are replayed CUDA graphs."""
        return self._graphs is not None

    def configure_model(self) -> None:
        if self.shares_weights:
            assert self.device_mesh is not None
            methods = ("loss_for_training", "validation_step", "measure_test_batch")
            share_weights(self, self.model.blocks, self.device_mesh["data_parallel"], methods=methods)

    def average_gradients(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Let DDP average the gradients over the processes.

        Args:
            wrap: returns DDP around a module.
        """
        self._averaged = [wrap(MeanLoss(self.loss))]

    @contextmanager
    def without_averaging(self) -> Iterator[None]:
        """In this context a backward pass adds to the gradients and does not average them."""
        with self._averaged[0].no_sync():
            yield

    def _take_part(self, batch: Mapping[str, Tensor | None]) -> None:
        """Tell the mixers which part of its rows the batch is. It is so until the next batch, whose backward pass may
        compute blocks again."""
        if self.context_group is None:
            return
        before = batch["before"]
        assert before is not None
        part = SequencePart(
            self.context_group,
            self.context_number,
            process_count_of(self.context_group),
            before=before,
            cu_seqlens=batch["cu_seqlens"],
            documents=batch.get("documents"),
        )
        self.validation.positions.part = self.test.positions.part = part
        self._tell_mixers(part)

    def _tell_mixers(self, part: SequencePart | None) -> None:
        for module in self.model.modules():
            if isinstance(module, Mixer):
                module.part = part

    def on_fit_start(self) -> None:
        if self.cuda_graphs:  # the strategy may have replaced the parameters since the task was made
            calls = WARMUP_CALLS_OF_DDP if self._averaged else WARMUP_CALLS
            self._graphs = GraphedLoss(self.loss_for_training, self.model.parameters(), warmup_calls=calls)

    def on_fit_end(self) -> None:
        self._tell_mixers(None)

    def free_graphs(self) -> None:
        """Free the CUDA graphs. Call it before the processes of a run part: they wait until no graph needs the
        connections between their devices."""
        self._graphs = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rate of this batch's step. It depends only on the step and the settings, not on the
        checkpoint. A run that is resumed with more steps therefore has the rates of the longer run."""
        step = self.trainer.global_step
        factor = learning_rate_factor(self.scheduler_config, step=step, total_steps=self.total_steps)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.optimizer_config["lr"] * group["lr_scale"] * factor

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        pieces = self.trainer.accumulate_grad_batches
        first = batch_idx % pieces == 0
        parts = pieces * process_count()
        weight = self.step_mean.weight(batch["targets"], first=first) if parts > 1 else None
        inputs = {name: batch.get(name) for name in INPUTS}
        loss = self._replay(inputs, weight, first=first)
        if loss is None:
            loss = self._mean_loss(inputs)
        mean = loss
        if weight is not None:
            loss = self.step_mean.add(loss) * weight
            if (batch_idx + 1) % pieces == 0:
                self.step_mean.complete()
            mean = self.step_mean.loss
        mean = mean.detach()
        self.step_metrics = with_bits("train", mean, self.bytes_per_token)
        return {"loss": loss, "mean": mean}

    def _replay(self, inputs: Mapping[str, Tensor | None], weight: Tensor | None, *, first: bool) -> Tensor | None:
        """The loss, whose gradients are already added to those of the parameters; None without CUDA graphs."""
        if self._graphs is None:
            return None
        pieces = self.trainer.accumulate_grad_batches
        scale = self.loss_scale(weight) / pieces
        try:
            return self._graphs(inputs, scale=scale, first=first, accumulates=pieces > 1)
        except CaptureError as error:
            if self._averaged or self.shares_weights:
                if not is_of_compiler(error.__cause__):  # the processes cannot change their exchanges within a step
                    raise InputError(f"CUDA graphs: {error}. Use compile=true, which has none.") from error
                self._graphs = None
                return None
            why = f"without torch.compile and CUDA graphs: {error}"
            get_console().print(why, markup=False, highlight=False, soft_wrap=True)
            self._graphs, self._compile, self.loss = None, False, self.loss.uncompiled()
            if first:  # otherwise the gradients of the step's earlier pieces stay, and those of this one are added
                self.zero_grad()
            return None

    def _mean_loss(self, inputs: Mapping[str, Tensor | None]) -> Tensor:
        """The loss without CUDA graphs. Raises InputError if torch.compile fails that must compile."""
        try:
            return self.loss_for_training(**inputs)
        except RuntimeError as error:
            if not self._compile or not is_of_compiler(error):
                raise
            why = " ".join(str(error).split())[:300]
            if self._compile != "auto" or self.shares_weights:
                raise InputError(f"torch.compile failed: {why}. Use compile=false.") from error
        if self.trainer.is_global_zero:
            get_console().print(f"without torch.compile: {why}", markup=False, highlight=False, soft_wrap=True)
        self._compile, self.loss = False, self.loss.uncompiled()
        for averaged in self._averaged:
            averaged.module.loss = self.loss
        return self.loss_for_training(**inputs)

    def loss_for_training(
        self, *, before: Tensor | None = None, documents: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        """The mean loss, whose gradients the devices average. Arguments: the entries of a batch."""
        self._take_part({"before": before, "cu_seqlens": inputs.get("cu_seqlens"), "documents": documents})
        return self._averaged[0](**inputs) if self._averaged else self.loss.mean(**inputs)  # type: ignore[arg-type]

    def loss_scale(self, weight: Tensor | None) -> Tensor:
        """The factor for the loss before its backward pass: the piece's weight, times the loss scale in float16."""
        factor = torch.ones((), device=self.device) if weight is None else weight
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return factor if scaler is None else scaler.scale(factor)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._graphs is None:  # otherwise the graph has computed the gradients
            loss.backward(*args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self._graphs is None:  # otherwise the graph has already overwritten the gradients
            optimizer.zero_grad()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._take_part(batch)
        self.validation.update(self.model, batch, token_losses=self.loss.each)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.validation.compute(), logger=False)
        last = self.trainer.state.fn == TrainerFn.FITTING and self.trainer.global_step >= self.total_steps
        if last and self.test_batches is not None:
            self._measure_test(self.test_batches)
            self.log_dict(self.test.compute(), logger=False)
        if isinstance(self, FSDPModule):
            # Frees the gathered weights, so that the next validation gathers the new ones. A step that replays a graph
            # does not do it.
            self.reshard()

    def _measure_test(self, batches: Loader) -> None:
        """Measure the test split like a validation: with the same limit on batches, in the same precision."""
        trainer, limit = self.trainer, self.trainer.limit_val_batches
        count = max(1, int(limit * len(batches))) if isinstance(limit, float) else limit
        for batch in islice(batches, count):
            with trainer.precision_plugin.val_step_context():
                self.measure_test_batch(trainer.strategy.batch_to_device(batch))

    def measure_test_batch(self, batch: Batch) -> None:
        self._take_part(batch)
        self.test.update(self.model, batch, token_losses=self.loss.each)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient norm over all parameters. The same pass over the gradients makes them those of the mean
        over the step's targets.

        Lightning's own method rejects a fused optimizer under mixed precision, because such an optimizer would unscale
        the gradients after the clipping. `configure_optimizers` uses no fused optimizer if there is a loss scale.
        """
        limit = gradient_clip_val or math.inf
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm, pieces = torch.nn.utils.get_total_norm(gradients), self.trainer.accumulate_grad_batches
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        mean = self.step_mean.factor(pieces) if pieces * process_count() > 1 else torch.ones_like(norm)
        norm = norm * mean
        torch._foreach_mul_([local(gradient) for gradient in gradients], mean * (limit / (norm + 1e-6)).clamp(max=1))
        self.step_metrics["train/grad_norm"] = norm
        self.clipped_steps += norm > limit
        if self.skips_bad_steps:
            self._skip_if_bad(optimizer, norm)

    def _skip_if_bad(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Tell the optimizer on the device whether to skip this step, so that the host does not wait for the answer."""
        bad = ~(norm.isfinite() & self.step_metrics["train/loss"].isfinite())
        self.skipped_steps += bad
        self.skipped_in_a_row.copy_(torch.where(bad, self.skipped_in_a_row + 1, 0))
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined] # torch's own name, which loss scaling uses

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("optimizer_states", [])
        checkpoint["optimizer_states"] = [current_optimizer_state(state, self.model) for state in states]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # float16 uses a loss scale. A fused optimizer would remove the scale only in its step. For other optimizers
        # Lightning unscales the gradients first, so that the clipping sees their true size.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return build_optimizer(self.model, self.optimizer_config, fused=not scaled)
