"""Builds Lightning's trainer for a prepared run, and trains until the run ends or is stopped."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lkda.checks import InputError
from lkda.commands.command_line.errors import CommandError
from lkda.commands.run.launch import Processes, is_of_another_process
from lkda.commands.run.prepared_run import PreparedRun
from lkda.commands.run.run_directory import RunFiles
from lkda.commands.run.run_setup import RunPlan
from lkda.device import one_cpu_thread
from lkda.models.lm import LanguageModel
from lkda.training import accuracy, positions
from lkda.training.background import BackgroundWriter
from lkda.training.callbacks import (
    Checkpoints,
    DivergedError,
    DivergenceGuard,
    HangGuard,
    InterruptedRunError,
    LearntRun,
    Recorder,
    StopRequest,
)
from lkda.training.checkpoint import AtomicCheckpointIO
from lkda.training.memory import free_memory_of_earlier_runs, keep_freed_memory
from lkda.training.metrics_csv import MetricsCSV
from lkda.training.precision import PRECISIONS
from lkda.training.processes import process_count
from lkda.training.shares import part_of, share_of
from lkda.training.strategies import build_strategy
from lkda.training.task import LanguageModelTask
from lkda.training.throughput import Throughput


@dataclass(frozen=True)
class Outcome:
    """How a training ended.

    Attributes:
        ending: what ended the run before its last step; None if it was completed.
        checkpoints, checkpoint_seconds: how many were written, and for how long they stopped the training.
        skipped_steps: the steps that changed nothing, because their loss or gradient was not finite.
    """

    ending: InterruptedRunError | DivergedError | LearntRun | None
    checkpoints: int
    checkpoint_seconds: float
    skipped_steps: int


def quiet_libraries() -> None:
    """Suppress the tips and device lists that Lightning prints."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # When a process that it has started ends, the launcher says so and kills the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # the values are already those of all processes
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated.*")
    # On a CPU in bf16-mixed, a norm with weights in float32 is computed in float32 and rounded once, as it should be.
    warnings.filterwarnings("ignore", message=".*Cannot dispatch to fused implementation.*")


def share_data(prepared: PreparedRun, processes: Processes) -> None:
    """Give this process its share of every batch."""
    data, options = prepared.data, prepared.plan.trainer
    group, number = divmod(processes.rank, options.context_parallel)
    rows = data.batch_size // options.data_parallel
    share = share_of(rank=group, count=options.data_parallel, rows=data.batch_size)
    part = part_of(number=number, count=options.context_parallel, rows=rows)
    if options.context_parallel > 1:
        data.share = (lambda batch: part(share(batch))) if options.data_parallel > 1 else part
    elif options.data_parallel > 1:
        data.share = share


def build_task(prepared: PreparedRun, model: LanguageModel, processes: Processes | None = None) -> LanguageModelTask:
    """The LightningModule that trains `model` as planned.

    Args:
        processes: of the run, which have joined; None for a run of one process.
    """
    plan, data = prepared.plan, prepared.data
    on_gpu = plan.compile == "auto" and plan.device.type == "cuda"
    compiles = on_gpu and prepared.without_compiler is None
    context_parallel = plan.trainer.context_parallel
    group = processes.context_group(context_parallel) if processes is not None and context_parallel > 1 else None
    if plan.trainer.strategy == "ddp" and (plan.compile is True or compiles):
        # A block is compiled as a whole. Its gradients are averaged while the block before it runs backward.
        torch._dynamo.config.optimize_ddp = False
    return LanguageModelTask(
        model,
        optimizer=plan.optimizer,
        scheduler=plan.scheduler,
        total_steps=prepared.total_steps,
        context=data.context,
        bytes_per_token=data.bytes_per_token,
        val_subsets=data.val_subsets,
        test_batches=None if data.test is None else data.in_order(data.test.batches),
        test_bytes_per_token=None if data.test is None else data.test.bytes_per_token,
        compile="auto" if compiles else plan.compile is True,
        checkpointing=plan.checkpointing,
        skips_bad_steps=plan.trainer.bad_steps == "skip",
        cuda_graphs=on_gpu and prepared.without_graphs is None,
        shares_weights=plan.trainer.strategy == "fsdp",
        context_group=group,
        context_number=0 if processes is None else processes.rank % context_parallel,
    )


def trainer_options(plan: RunPlan, total_steps: int) -> dict[str, Any]:
    """The options from which Hydra builds the trainer, without strategy, loggers and callbacks."""
    options = asdict(plan.trainer)
    for name in ("max_tokens", "strategy", "global_batch", "context_parallel", "timeout_minutes", "bad_steps"):
        del options[name]
    return {"_target_": options.pop("target"), **options} | {
        # The sequence of batches has no end. Validation and the end of training are therefore counted in steps.
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,  # the batches know their rank
        "accelerator": plan.device.type,
        "max_steps": total_steps,
        # Lightning counts batches here. The product makes every interval end at the end of an optimizer step.
        "val_check_interval": plan.trainer.val_check_interval * plan.trainer.accumulate_grad_batches,
    }


def build_trainer(
    prepared: PreparedRun, model: LanguageModel, run: RunFiles, stop_request: StopRequest, processes: Processes
) -> L.Trainer:
    """The trainer of the plan, which records into `run`. The callbacks that record come before those of the
    configuration. Only the first process has loggers.

    Raises: InputError if Lightning rejects the settings, or would run in another precision.
    """
    plan = prepared.plan
    shown = callbacks_of(plan)
    options = trainer_options(plan, prepared.total_steps) | {
        "default_root_dir": str(run.path),
        "profiler": _profiler(plan.trainer.profiler, run, rank=processes.rank),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in shown),
    }
    writer = BackgroundWriter()
    callbacks = [*_own_callbacks(prepared, model, run, stop_request, writer), *shown]
    if plan.trainer.world_size > 1:
        minutes = plan.trainer.timeout_minutes
        callbacks.append(HangGuard(60 * minutes, lambda: processes.give_up(_no_answer(minutes))))
    loggers = _loggers(prepared, run) if processes.is_first else []
    strategy = build_strategy(
        plan.trainer.strategy,
        world_size=plan.trainer.world_size,
        timeout=timedelta(minutes=plan.trainer.timeout_minutes),
        environment=processes.environment,
    )
    if not isinstance(strategy, str):
        strategy.checkpoint_io = AtomicCheckpointIO(writer)
    plugins = [AtomicCheckpointIO(writer)] if isinstance(strategy, str) else []
    try:
        trainer = instantiate(
            options, callbacks=callbacks, logger=loggers, plugins=plugins, strategy=strategy, _convert_="partial"
        )
    except InstantiationException as error:
        raise InputError(f"Lightning refuses these settings: {_on_one_line(error.__cause__ or error)}") from error
    assert isinstance(trainer, L.Trainer)
    if trainer.precision != plan.trainer.precision:  # Lightning may choose another one with only a warning
        raise InputError(
            f"trainer.precision={plan.trainer.precision} would run as {trainer.precision}: set it to that."
        )
    return trainer


def callbacks_of(plan: RunPlan) -> list[L.Callback]:
    """New callbacks of the configuration. Raises InputError for an option that one of them refuses."""
    made = [instantiate(node) for node in plan.callbacks]
    wrong = [type(callback).__name__ for callback in made if not isinstance(callback, L.Callback)]
    if wrong:
        raise InputError(f"a _target_ in callbacks makes a {wrong[0]}, which is not a Lightning callback.")
    return made


def _profiler(word: str | None, run: RunFiles, *, rank: int) -> Profiler | None:
    """Lightning's profiler of that name. It writes into fit-profile.txt in the run directory."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
    filename = "profile" if rank == 0 else f"profile-rank{rank}"
    return None if word is None else kinds[word](dirpath=run.path, filename=filename)


def _own_callbacks(
    prepared: PreparedRun,
    model: LanguageModel,
    run: RunFiles,
    stop_request: StopRequest,
    writer: BackgroundWriter,
) -> list[L.Callback]:
    plan, tokenizer = prepared.plan, prepared.data.tokenizer
    checkpoints = Checkpoints(
        run.checkpoints,
        every_n_steps=plan.checkpoint.every_n_steps,
        every_minutes=plan.checkpoint.every_minutes,
        keep=plan.checkpoint.keep,
        writer=writer,
        stop_request=stop_request,
        model=prepared.model_config,
        tokenizer=None if tokenizer is None else tokenizer.to_str(),
        run=prepared.metadata,
    )
    tokens_per_step = prepared.metadata["tokens_per_step"]
    throughput = Throughput.of(
        model,
        context=prepared.data.context,
        device=plan.device,
        dtype=PRECISIONS[plan.trainer.precision],
        devices=plan.trainer.world_size,
    )
    recorder = Recorder(
        every_n_steps=plan.trainer.log_every_n_steps, tokens_per_step=tokens_per_step, throughput=throughput
    )
    guard = DivergenceGuard(plan.trainer.log_every_n_steps, skips=plan.trainer.bad_steps == "skip")
    return [guard, recorder, checkpoints]


def _loggers(prepared: PreparedRun, run: RunFiles) -> list[L.pytorch.loggers.Logger]:
    """The logger of metrics.csv first, then the loggers of the configuration."""
    plan, data = prepared.plan, prepared.data
    also = accuracy.columns(data.val_subsets) if data.val_subsets else positions.columns(data.context)
    if data.test is not None:
        also += ["test/loss", "test/bits_per_byte", *positions.columns(data.context, split="test")]
    config = plan.record | {"data": {**plan.record["data"], "source": data.source}}  # many data have no such option
    chosen = [instantiate(node)(save_dir=str(run.path), config=config) for node in plan.loggers]
    return [MetricsCSV(run.metrics, also=also, resume_step=prepared.first_step), *chosen]


def fit(
    trainer: L.Trainer,
    task: LanguageModelTask,
    prepared: PreparedRun,
    stop_request: StopRequest,
    processes: Processes,
) -> Outcome:
    """Train, beginning with the plan's first step.

    Raises: InputError if Lightning rejects the settings; CommandError if another process of the run has ended. On a GPU
        the process then ends at once instead, because a GPU that waits for another lets nothing be freed.
    """
    if prepared.plan.device.type == "cpu":
        keep_freed_memory()
    free_memory_of_earlier_runs()
    data = prepared.data
    data.start_batch = prepared.first_step * prepared.plan.trainer.accumulate_grad_batches
    ending: InterruptedRunError | DivergedError | LearntRun | None = None
    with stop_request, one_cpu_thread(prepared.plan.device):
        try:
            trainer.fit(task, datamodule=data, ckpt_path=prepared.checkpoint, weights_only=True)
            stop_request.finish()
        except (InterruptedRunError, DivergedError) as error:
            ending = error
        except MisconfigurationException as error:
            raise InputError(f"Lightning refuses these settings: {_on_one_line(error)}") from error
        except RuntimeError as error:
            if process_count() == 1 or not is_of_another_process(error):
                raise
            message = _no_answer(prepared.plan.trainer.timeout_minutes)
            if prepared.plan.device.type == "cuda":
                processes.give_up(message)
            raise CommandError(message) from error
        finally:
            task.free_graphs()
    if ending is None and trainer.global_step < prepared.total_steps:
        ending = LearntRun(trainer.global_step)
    (checkpoints,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    (guard,) = (callback for callback in trainer.callbacks if isinstance(callback, DivergenceGuard))  # type: ignore[attr-defined]
    return Outcome(ending, checkpoints.count, checkpoints.seconds, guard.skipped_steps(task))


def _no_answer(minutes: float) -> str:
    return (
        f"another process of the run has ended, or did not answer for {minutes} minutes (trainer.timeout_minutes). "
        "Continue from the last checkpoint with resume=true."
    )


def _on_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
