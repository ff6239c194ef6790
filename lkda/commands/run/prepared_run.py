"""A plan together with its prepared data, and everything that depends on the data or on the run that is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lkda.checks import InputError, refusing_damage
from lkda.commands.run.run_directory import RunDirectory, fingerprint_of
from lkda.commands.run.run_setup import RunPlan
from lkda.commands.run.sequence_memory import check_sequence_memory
from lkda.commands.settings.data_options import build_data
from lkda.data.datamodule import IndexedDataModule, TestSplit
from lkda.data.text.packed import PackedDataModule
from lkda.device import physical_memory
from lkda.models.build import build_model
from lkda.models.lm import LanguageModel
from lkda.run_failure import OtherRunError
from lkda.training.callbacks.learnt import check_has_accuracy
from lkda.training.memory import check_activations
from lkda.training.metrics_csv import check_rows, steps_with
from lkda.training.options import check_validation_batches
from lkda.training.precision import PRECISIONS

# A checkpoint to resume from: its path and its content.
Saved = tuple[Path, dict[str, Any]]


@dataclass(frozen=True)
class PreparedRun:
    """Everything that is known before the first step.

    Attributes:
        data: the prepared data module.
        model_config: the complete dict of `build_model`.
        metadata: plain values that describe the run, for its checkpoints and its summary.
        total_steps: optimizer steps of the whole run.
        checkpoint: the file to resume from; None for a new run.
        first_step: the number of steps that are already done.
        steps_since_row: how many of them were done after the last row of training; None if that is not known.
    """

    plan: RunPlan
    data: IndexedDataModule
    model_config: dict[str, Any]
    metadata: dict[str, Any]
    total_steps: int
    checkpoint: Path | None
    first_step: int
    steps_since_row: int | None

    def is_finished(self, run: RunDirectory) -> bool:
        """Whether the directory already holds the result of this many steps, or of a run that has learnt its task."""
        if self.first_step < self.total_steps and self.plan.stop_accuracy is None:
            return False
        summary = run.read_summary()
        ended = self.first_step >= self.total_steps or self.learnt_accuracy(summary) is not None
        return ended and summary.get("status") == "finished"

    def learnt_accuracy(self, summary: Mapping[str, Any]) -> float | None:
        """The accuracy of a run in a validation at its last step, if a callback ends the run at this accuracy. None if
        the run trains on.

        Args:
            summary: the content of summary.json.
        """
        found = summary.get("val/accuracy")
        if self.plan.stop_accuracy is None or summary.get("steps") != self.first_step or not isinstance(found, float):
            return None
        return found if found >= self.plan.stop_accuracy[1] else None

    @property
    def without_compiler(self) -> str | None:
        """What does not allow torch.compile on a GPU; None if nothing does."""
        if self.plan.trainer.detect_anomaly:
            return "trainer.detect_anomaly"
        return "context_parallel" if self.plan.trainer.context_parallel > 1 else None  # its exchanges are not traced

    @property
    def without_graphs(self) -> str | None:
        """What does not allow CUDA graphs on a GPU; None if nothing does.

        The processes of a run must capture and replay the same exchanges at the same time. So their batches have one
        shape, and each is a step.
        """
        trainer = self.plan.trainer
        if trainer.detect_anomaly:
            return "trainer.detect_anomaly"
        if trainer.strategy != "single" and trainer.accumulate_grad_batches > 1:
            return f"{trainer.strategy} with trainer.accumulate_grad_batches"
        if trainer.strategy != "single" and self.data.val_subsets:  # the number of targets differs from batch to batch
            return f"{trainer.strategy} with data={self.data.source}"
        return None

    def check_rows(self, run: RunDirectory) -> bool:
        """Whether metrics.csv has rows up to the step from which the run is resumed. True for a new run.

        Raises: InputError if only some of these rows are there.
        """
        return self.first_step == 0 or check_rows(
            run.metrics,
            step=self.first_step,
            since_row=self.steps_since_row,
            validation_interval=self.plan.trainer.val_check_interval,
        )

    def check_steps(self, run: RunDirectory) -> None:
        """Raise OtherRunError if the run has already done more than `total_steps` steps, or this many without a
        validation."""
        step = self.first_step
        if step < self.total_steps:
            return
        if step > self.total_steps or step not in steps_with(run.metrics, "val/loss"):
            raise OtherRunError(
                f"{run.path} has already done {step} steps, so {self.total_steps} steps leave nothing to train: "
                f"give trainer.max_steps={step + 1} or more."
            )


def data_of(plan: RunPlan) -> IndexedDataModule:
    """The data module of the run, which is not prepared yet.

    Raises: InputError for options that do not fit together, and for data that cannot be trained on.
    """
    data = build_data(plan.data)
    if plan.stop_accuracy is not None:
        check_has_accuracy(data.val_subsets)
    _ = data.tokens_per_batch  # raises for data of evaluations
    return data


def prepare_data(plan: RunPlan, saved: Saved | None) -> IndexedDataModule:
    """The prepared data of the run. Raises InputError if they are not the data of the run that is resumed."""
    data = data_of(plan)
    if plan.device.type == "cpu":  # a GPU has an error of its own for this
        check_activations(
            plan.model,
            tokens=data.tokens_per_batch,
            checkpointing=plan.checkpointing,
            dtype=PRECISIONS[plan.trainer.precision],
            available=physical_memory(),
        )
    check_sequence_memory(
        data,
        plan.data,
        width=plan.model["d_model"],
        device=plan.device,
        limit=plan.trainer.limit_val_batches,
        available=physical_memory(),
    )
    data.expected = fingerprint_of(saved[1]) if saved else {}
    limit = plan.trainer.limit_val_batches
    if isinstance(data, PackedDataModule) and isinstance(limit, int):
        data.measure_at_most(limit)  # bits per byte are those of the measured part
    data.prepare()
    return data


def with_data(plan: RunPlan, data: IndexedDataModule, saved: Saved | None) -> PreparedRun:
    """The plan with its prepared data. Raises InputError if they do not fit together."""
    check_validation_batches(plan.trainer.limit_val_batches, data.val_batches)
    parts = plan.trainer.context_parallel
    if data.context % parts:
        raise InputError(
            f"data.context={data.context} tokens cannot be divided among trainer.context_parallel={parts} devices: "
            f"give a multiple of {parts}."
        )
    if parts > 1 and data.val_subsets:
        raise InputError(f"trainer.context_parallel={parts} needs data of text or data=random, got data={data.source}.")
    tokens_per_step = data.tokens_per_batch * plan.trainer.accumulate_grad_batches
    metadata = {
        "mixer": plan.mixer_name,
        "model": plan.model_name,
        "data": data.source,
        "seed": plan.seed,
        "learning_rate": plan.optimizer["lr"],
        "context": data.context,
        "tokens_per_step": tokens_per_step,
        "bytes_per_token": data.bytes_per_token,
        "unigram_entropy": data.unigram_entropy,
        "val_subsets": [dict(subset) for subset in data.val_subsets],
        "test": None if data.test is None else _test_metadata(data.test),
        "fingerprint": dict(data.fingerprint),
    }
    return PreparedRun(
        plan=plan,
        data=data,
        model_config=model_config(
            plan.model,
            vocab_size=data.vocab_size,
            context=data.context,
            # Of these data, data.vocab_size says how many tokens there are.
            data_has_vocab_size="vocab_size" in plan.data and plan.data.get("tokenizer_path") is None,
            task=data.source if data.val_subsets else None,
        ),
        metadata=metadata,
        total_steps=plan.trainer.steps(tokens_per_step),
        checkpoint=saved[0] if saved else None,
        first_step=saved[1]["lkda"]["step"] if saved else 0,
        steps_since_row=_steps_since_row(saved[1]) if saved else None,
    )


def _steps_since_row(checkpoint: Mapping[str, Any]) -> int | None:
    """Checkpoints of earlier versions do not have it."""
    with refusing_damage("the checkpoint"):
        return int(checkpoint["lkda_clipped"][1]) if "lkda_clipped" in checkpoint else None


def _test_metadata(test: TestSplit) -> dict[str, Any]:
    return {name: getattr(test, name) for name in ("tokens", "bytes_per_token", "unigram_entropy")}


def model_config(
    model: Mapping[str, Any],
    *,
    vocab_size: int,
    context: int,
    data_has_vocab_size: bool = False,
    task: str | None = None,
) -> dict[str, Any]:
    """The complete dict of `build_model`.

    Args:
        model: as in a plan.
        vocab_size: of the tokenizer. The embedding has as many rows, unless model.vocab_size is larger.
        context: training length in tokens.
        data_has_vocab_size: whether data.vocab_size may be advised, where the embedding has too few rows.
        task: the name of the data if they are a synthetic task, which has no tokenizer.
    Raises: InputError if the tokenizer or the task has more tokens than the embedding has rows.
    """
    rows = model["vocab_size"] or vocab_size
    if vocab_size > rows:
        instead = f", or data.vocab_size to {rows} or less" if data_has_vocab_size else ""
        what, choose = ("the tokenizer", "") if task is None else (f"data={task}", "choose model=recall, or ")
        raise InputError(
            f"{what} has {vocab_size} tokens, but the model has only {rows} rows: "
            f"{choose}set model.vocab_size to {vocab_size} or more{instead}."
        )
    return {**model, "vocab_size": rows, "context": context}


def model_of(prepared: PreparedRun) -> LanguageModel:
    """The model to train, on the CPU: initialized at random from the run's seed, or the model of `init_from`.

    If the run is resumed, the weights of the checkpoint replace these later.
    """
    plan = prepared.plan
    L.seed_everything(plan.seed, workers=True, verbose=False)
    if plan.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # matrix products that stay in float32 may use TF32
    if plan.initial is None:
        return build_model(prepared.model_config)
    plan.initial.config = prepared.model_config
    return plan.initial
