"""Train a language model and record the run in a run directory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lkda.commands.command_line.errors import CommandError
from lkda.commands.command_line.invocation import has_new_directory
from lkda.commands.run.checkpoint_loading import load_trained
from lkda.commands.run.console import RunConsole, draw_sample
from lkda.commands.run.fit import Outcome, build_task, build_trainer, fit, quiet_libraries, share_data
from lkda.commands.run.launch import Processes
from lkda.commands.run.prepared_run import PreparedRun, Saved, model_of, prepare_data, with_data
from lkda.commands.run.run_directory import RunDirectory, RunFiles
from lkda.commands.run.run_setup import RunPlan, plan_run
from lkda.commands.run.summary import summarize
from lkda.models.lm import LanguageModel
from lkda.training.callbacks import DivergedError, InterruptedRunError, StopRequest
from lkda.training.checkpoint import step_files


def train(config: DictConfig, run_dir: str | Path) -> dict[str, Any]:
    """Train, validate at the end, and save everything in `run_dir`.

    Args:
        config: composed from configs/train.yaml.
        run_dir: where the run is recorded. If its name is that of the time and another run has it, a number is added.
    Returns: the content of summary.json. If the run has several processes, only the first writes it; the others return
        {}.
    Raises:
        InputError: the configuration, the data or the directory cannot be used. It is raised before training starts.
        CommandError: the loss or a parameter became NaN or infinite.
        SystemExit: Ctrl-C (code 130), SIGTERM (143) or SIGUSR1 (138) stopped the run. A checkpoint is saved.
    """
    quiet_libraries()
    plan = plan_run(config, Path(run_dir))
    with Processes(plan.trainer, accelerator=plan.device.type) as processes:
        if not processes.is_first:
            _train_beside(plan, Path(run_dir), processes)
            return {}
        run = RunDirectory.unused(run_dir) if has_new_directory() else RunDirectory(run_dir)
        try:
            return _train(plan, run, processes)
        finally:
            run.release()


def _train_beside(plan: RunPlan, own_directory: Path, processes: Processes) -> None:
    """The part of a process that is not the first: it trains, and writes nothing but its part of shared checkpoints.

    Args:
        own_directory: what Hydra made for this process. The run directory is the first process's.
    """
    processes.join()
    start = processes.receive()
    if start is None:
        return
    run = RunFiles(start["directory"])
    if own_directory.absolute() != run.path:
        with suppress(OSError):  # fails if a directory is not empty, or not there
            own_directory.rmdir()
            own_directory.parent.rmdir()
    saved: Saved | None = start["saved"]
    prepared = with_data(plan, processes.one_at_first(lambda: prepare_data(plan, saved)), saved)
    _fit(prepared, model_of(prepared), run, processes)


def _fit(prepared: PreparedRun, model: LanguageModel, run: RunFiles, processes: Processes) -> Outcome:
    """Train on this process's device."""
    share_data(prepared, processes)
    stop_request = StopRequest(processes.group)
    trainer = build_trainer(prepared, model, run, stop_request, processes)
    return fit(trainer, build_task(prepared, model, processes), prepared, stop_request, processes)


def _train(plan: RunPlan, run: RunDirectory, processes: Processes) -> dict[str, Any]:
    console = RunConsole(run)
    saved = run.begin(plan.record, resume=plan.resume)
    prepared = with_data(plan, prepare_data(plan, saved), saved)
    if prepared.is_finished(run):
        processes.dismiss()
        console.print_nothing_to_do(prepared)
        return run.read_summary()
    if not prepared.check_rows(run):
        console.print_lost_rows(prepared.first_step)
    prepared.check_steps(run)
    model = model_of(prepared)
    run.write_config(plan.record)
    if prepared.data.tokenizer is not None:
        run.write_tokenizer(prepared.data.tokenizer)
    console.print_start(prepared)
    processes.join()
    # The others need of the checkpoint only what describes it. Each reads the tensors itself.
    described = None if saved is None else (saved[0], {"lkda": saved[1]["lkda"]})
    processes.send({"directory": run.path, "saved": described})
    processes.wait()
    outcome = _fit(prepared, model, run, processes)
    ending, summary = outcome.ending, summarize(run, model, prepared, outcome)
    run.write_summary(summary)
    if isinstance(ending, InterruptedRunError):
        console.print_interruption(ending)
        raise SystemExit(ending.exit_code)
    if isinstance(ending, DivergedError):
        raise CommandError(_divergence(ending, run))
    console.print_result(prepared, summary, _write_sample(run, model, prepared))
    return summary


def trained_model(prepared: PreparedRun, model: LanguageModel, run: RunFiles) -> LanguageModel:
    """The trained model on one device. If the devices share its weights, it is read from the last checkpoint."""
    if prepared.plan.trainer.strategy != "fsdp":
        return model
    return load_trained(run.checkpoints / "last.ckpt", backend=prepared.model_config["backend"]).model


def _write_sample(run: RunDirectory, model: LanguageModel, prepared: PreparedRun) -> str | None:
    """A text sampled from the trained model. It is also written into the run directory. None if its tokens are not
    text."""
    plan, tokenizer = prepared.plan, prepared.data.tokenizer
    if tokenizer is None:
        return None
    trained = trained_model(prepared, model, run)
    sample = draw_sample(trained.to(plan.device), tokenizer, plan.sample, seed=plan.seed)
    run.write_samples(sample)
    return sample


def _divergence(ending: DivergedError, run: RunDirectory) -> str:
    good = [str(path) for path in step_files(run.checkpoints)] or ["none, it happened before the first one"]
    return f"{ending}. Last good checkpoint: {good[-1]}. Try a lower optimizer.lr in a new run directory."
