"""Train a language model and record the run in a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lkda.commands.command_line import CommandError
from lkda.commands.console import RunConsole, draw_sample
from lkda.commands.fit import build_task, build_trainer, fit, quiet_libraries
from lkda.commands.prepared_run import PreparedRun, model_of, prepare_data, with_data
from lkda.commands.run_directory import RunDirectory
from lkda.commands.run_setup import RunPlan, plan_run
from lkda.commands.summary import summarize
from lkda.models.lm import LanguageModel
from lkda.training.callbacks import DivergedError, InterruptedRunError, StopRequest
from lkda.training.checkpoint import step_files


def train(config: DictConfig, run_dir: str | Path) -> dict[str, Any]:
    """Train, validate at the end, and save everything in `run_dir`.

    Args:
        config: composed from configs/train.yaml.
        run_dir: where the run is recorded.
    Returns: the content of summary.json.
    Raises:
        InputError: the configuration, the data or the directory cannot be used. It is raised before training starts.
        CommandError: the loss or a parameter became NaN or infinite.
        SystemExit: Ctrl-C (code 130) or SIGTERM (code 143) stopped the run. A checkpoint is saved.
    """
    quiet_libraries()
    plan = plan_run(config, Path(run_dir))
    run = RunDirectory(run_dir)
    try:
        return _train(plan, run)
    finally:
        run.release()


def _train(plan: RunPlan, run: RunDirectory) -> dict[str, Any]:
    console = RunConsole(run)
    saved = run.begin(plan.record, resume=plan.resume)
    prepared = with_data(plan, prepare_data(plan, saved), saved)
    if prepared.is_finished(run):
        console.print_nothing_to_do(prepared.first_step)
        return run.read_summary()
    prepared.check_steps(run)
    model = model_of(prepared)
    run.write_config(plan.record)
    if prepared.data.tokenizer is not None:
        run.write_tokenizer(prepared.data.tokenizer)
    console.print_start(prepared)
    stop_request = StopRequest()
    trainer = build_trainer(prepared, model, run, stop_request)
    ending = fit(trainer, build_task(prepared, model), prepared, stop_request)
    summary = summarize(run, model, prepared, ending)
    run.write_summary(summary)
    if isinstance(ending, InterruptedRunError):
        console.print_interruption(ending)
        raise SystemExit(ending.exit_code)
    if isinstance(ending, DivergedError):
        raise CommandError(_divergence(ending, run))
    console.print_result(summary, _write_sample(run, model, prepared))
    return summary


def _write_sample(run: RunDirectory, model: LanguageModel, prepared: PreparedRun) -> str | None:
    """A text sampled from the trained model. It is also written into the run directory. None if its tokens are not
    text."""
    plan, tokenizer = prepared.plan, prepared.data.tokenizer
    if tokenizer is None:
        return None
    sample = draw_sample(model.to(plan.device), tokenizer, plan.sample, seed=plan.seed)
    run.write_samples(sample)
    return sample


def _divergence(ending: DivergedError, run: RunDirectory) -> str:
    good = [str(path) for path in step_files(run.checkpoints)] or ["none, it happened before the first one"]
    return f"{ending}. Last good checkpoint: {good[-1]}. Try a lower optimizer.lr in a new run directory."
