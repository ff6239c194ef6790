"""Train a language model as the configuration says, into a run directory."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from rich.console import Console

from lkda.checks import InputError, check_count
from lkda.commands.command_line import CommandError
from lkda.commands.console import draw_sample, print_closing
from lkda.commands.initial import with_initial_model
from lkda.commands.invocation import command, given_overrides
from lkda.commands.overrides import override
from lkda.commands.paths import with_absolute_paths
from lkda.commands.run_directory import RunDirectory, fingerprint_of
from lkda.commands.settings import (
    check_model,
    check_options,
    device_of,
    model_config,
    plain,
    steps_for,
)
from lkda.commands.summary import summarize
from lkda.data.datamodule import IndexedDataModule
from lkda.formats import has_folded_embedding
from lkda.models.lm import LanguageModel
from lkda.training import accuracy, positions
from lkda.training.callbacks import (
    Checkpoints,
    DivergedError,
    DivergenceGuard,
    InterruptedRunError,
    Recorder,
    StopRequest,
)
from lkda.training.checkpoint import AtomicCheckpointIO, step_files
from lkda.training.metrics_csv import MetricsCSV, steps_with
from lkda.training.optimizer import check_optimizer, check_schedule
from lkda.training.options import (
    MOST_SEED,
    check_checkpoint,
    check_sample,
    check_switch,
    check_trainer,
    check_validation_batches,
)
from lkda.training.precision import PRECISIONS, resolve_precision
from lkda.training.task import LanguageModelTask

GROUPS = ("model", "mixer", "data", "optimizer", "scheduler", "trainer", "checkpoint", "sample", "callbacks", "logger")
# What a run gives the trainer besides its group. The stream of batches has no end, so steps decide when to validate
# and when to end; the batches know their rank.
OF_EVERY_RUN = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
}


def train(config: DictConfig, run_dir: str | Path) -> dict[str, Any]:
    """Train, validate at the end, and leave everything in `run_dir`.

    Args:
        config: composed from configs/train.yaml.
        run_dir: where the run is recorded.
    Returns: what summary.json holds.
    Raises:
        ValueError: before training starts: something in the configuration, the data or the directory does not do.
        CommandError: the loss diverged.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143), with a checkpoint saved.
    """
    quiet()
    _check(plain(config))
    config, initial = with_initial_model(with_absolute_paths(config))
    settings = plain(config)
    device = device_of(config.trainer.accelerator)
    settings["trainer"]["precision"] = resolve_precision(settings["trainer"]["precision"], device)
    check_options(config.data)
    check_model(model_config(settings, vocab_size=1, context=1), device=device, precision=_precision(settings))
    run = RunDirectory(run_dir)
    try:
        return _train_in(run, config, settings, device, initial)
    finally:
        run.release()


def _check(settings: dict[str, Any]) -> None:
    """Raise ValueError for what no run can use, whatever its data and its device."""
    for group in GROUPS:
        if settings.get(group) is None:
            raise InputError(f"{group} is null, and a run needs one: leave {group}=null out, or choose another.")
    check_trainer(settings["trainer"])
    check_optimizer(settings["optimizer"])
    check_schedule(settings["scheduler"])
    check_checkpoint(settings["checkpoint"])
    check_sample(settings["sample"])
    check_count("seed", settings["seed"], least=0, most=MOST_SEED)
    for name in ("compile", "resume"):
        check_switch(name, settings[name])
    if not isinstance(settings["init_from"], str | None):
        raise InputError(f"init_from must be the path of an exported directory, got {settings['init_from']!r}.")


def quiet() -> None:
    """Leave the terminal to what this project says: no tips and device lists of the libraries below."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def _precision(settings: dict[str, Any]) -> torch.dtype:
    """The type that the ops' inputs have under the trainer's precision."""
    return PRECISIONS[settings["trainer"]["precision"]]


@dataclass(frozen=True)
class _Plan:
    """What is settled before the first step.

    Attributes:
        settings: the resolved configuration, plain.
        model: the dict of `build_model`.
        backends: that will run, by operator.
        facts: plain facts of the run, for its checkpoints and its summary.
        steps: of the whole run.
        resume_from, step: the checkpoint to go on from, and its step; None and 0 for a fresh run.
    """

    config: DictConfig
    settings: dict[str, Any]
    device: torch.device
    model: dict[str, Any]
    backends: dict[str, str]
    facts: dict[str, Any]
    steps: int
    resume_from: Path | None
    step: int


def _train_in(
    run: RunDirectory,
    config: DictConfig,
    settings: dict[str, Any],
    device: torch.device,
    initial: LanguageModel | None,
) -> dict[str, Any]:
    console = Console(highlight=False, markup=False)
    if config.resume:
        settings = run.with_options_of_then(settings, given=given_overrides(without=()))
    saved = run.begin(settings, resume=config.resume)
    data = instantiate(settings["data"])
    data.expected = fingerprint_of(saved[1]) if saved else {}
    data.prepare()
    plan = _plan(config, settings, device, data, saved)
    if plan.step >= plan.steps and run.read_summary().get("status") == "finished":
        console.print(f"{run.path} holds a finished run of {plan.step} steps: nothing to do.", soft_wrap=True)
        return run.read_summary()
    _check_steps(run, plan)
    run.write_config(settings)
    if data.tokenizer is not None:
        run.write_tokenizer(data.tokenizer)
    _announce(console, run, plan)
    if data.no_test is not None:
        console.print(f"no test split: {data.no_test}", soft_wrap=True)
    model, ending = _fit(run, plan, data, initial)

    status = {InterruptedRunError: "interrupted", DivergedError: "diverged"}.get(type(ending), "finished")
    step = ending.step if ending is not None else max(plan.step, plan.steps)
    summary = summarize(
        run, model, settings, plan.facts, status=status, step=step, device=device, backends=plan.backends
    )
    run.write_summary(summary)
    if isinstance(ending, InterruptedRunError):
        console.print(f"{ending}. Continue with\n  {_resume_command(run)}", soft_wrap=True)
        raise SystemExit(ending.exit_code)
    if isinstance(ending, DivergedError):
        good = [str(path) for path in step_files(run.checkpoints)] or ["none, it came before the first"]
        raise CommandError(
            f"{ending}. Last good checkpoint: {good[-1]}. Try a lower optimizer.lr in a new run directory."
        )
    sample = None
    if data.tokenizer is not None:
        sample = draw_sample(model.to(device), data.tokenizer, settings["sample"], seed=config.seed)
        run.write_samples(sample)
    print_closing(console, run, summary, sample)
    return summary


def _plan(
    config: DictConfig,
    settings: dict[str, Any],
    device: torch.device,
    data: IndexedDataModule,
    saved: tuple[Path, dict[str, Any]] | None,
) -> _Plan:
    """Settle what the prepared `data` decides, and where to go on from. Raises ValueError where it does not fit."""
    check_validation_batches(settings["trainer"]["limit_val_batches"], data.val_batches)
    tokens_per_step = data.tokens_per_batch * config.trainer.accumulate_grad_batches
    model = model_config(settings, vocab_size=data.vocab_size, context=data.context)
    facts = {
        "mixer": settings["mixer"]["name"],
        "model": settings["model"]["name"],
        "data": data.source,
        "seed": config.seed,
        "context": data.context,
        "tokens_per_step": tokens_per_step,
        "bytes_per_token": data.bytes_per_token,
        "unigram_entropy": data.unigram_entropy,
        "parts": [dict(part) for part in data.parts],
        "test": None
        if data.test is None
        else {
            "tokens": data.test.tokens,
            "bytes_per_token": data.test.bytes_per_token,
            "unigram_entropy": data.test.unigram_entropy,
        },
        "fingerprint": dict(data.fingerprint),
    }
    return _Plan(
        config=config,
        settings=settings,
        device=device,
        model=model,
        backends=check_model(model, device=device, precision=_precision(settings)),
        facts=facts,
        steps=steps_for(config.trainer.max_steps, config.trainer.max_tokens, tokens_per_step=tokens_per_step),
        resume_from=saved[0] if saved else None,
        step=saved[1]["lkda"]["step"] if saved else 0,
    )


def _check_steps(run: RunDirectory, plan: _Plan) -> None:
    """Raise ValueError where the run has come further than its new number of steps, or as far without validating."""
    if plan.step < plan.steps:
        return
    if plan.step > plan.steps or plan.step not in steps_with(run.metrics, "val/loss"):
        raise InputError(
            f"{run.path} has {plan.step} steps already, which leaves none to train and validate of {plan.steps}: "
            f"give trainer.max_steps={plan.step + 1} or more."
        )


def _announce(console: Console, run: RunDirectory, plan: _Plan) -> None:
    facts = plan.facts
    console.print(
        f"{facts['mixer']} · {facts['model']} · {facts['data']} on {plan.device}, "
        f"{plan.settings['trainer']['precision']}, "
        f"backend {' '.join(f'{op}={word}' for op, word in plan.backends.items())}; "
        f"{plan.steps:,} steps of {facts['tokens_per_step']:,} tokens\nrun directory {run.path}",
        soft_wrap=True,
    )
    if plan.config.init_from is not None:
        console.print(f"weights, model and tokenizer from {plan.config.init_from}", soft_wrap=True)
        if has_folded_embedding(plan.config.init_from):
            console.print(
                "its export wrote the embedding's norm or scale into the table: this model has neither, and its head "
                "is not tied to the embedding",
                soft_wrap=True,
            )
    if plan.config.resume:
        fresh = "nothing is saved here yet: starting afresh"
        console.print(f"resuming from step {plan.step}" if plan.resume_from else fresh)


def _fit(
    run: RunDirectory, plan: _Plan, data: IndexedDataModule, initial: LanguageModel | None
) -> tuple[Any, InterruptedRunError | DivergedError | None]:
    """Train, from the weights of `initial` if one is given. Returns the model, and what ended the run before its last
    step, if something did."""
    settings = plan.settings
    L.seed_everything(plan.config.seed, workers=True, verbose=False)
    if plan.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what is left in float32 may use TF32 products
    task = LanguageModelTask(
        plan.model,
        optimizer=settings["optimizer"],
        scheduler=settings["scheduler"],
        total_steps=plan.steps,
        context=data.context,
        bytes_per_token=data.bytes_per_token,
        parts=data.parts,
        test_batches=None if data.test is None else data.in_order(data.test.batches),
        test_bytes_per_token=None if data.test is None else data.test.bytes_per_token,
        compile=plan.config.compile,
    )
    if initial is not None:
        task.model.load_state_dict(initial.state_dict())  # a checkpoint to resume from is loaded over it
    data.start_batch = plan.step * plan.config.trainer.accumulate_grad_batches
    with StopRequest() as stop_request:
        checkpoints = Checkpoints(
            run.checkpoints,
            **settings["checkpoint"],
            stop_request=stop_request,
            model=plan.model,
            tokenizer=None if data.tokenizer is None else data.tokenizer.to_str(),
            run=plan.facts,
        )
        recorder = Recorder(
            every_n_steps=plan.config.trainer.log_every_n_steps, tokens_per_step=plan.facts["tokens_per_step"]
        )
        trainer = _trainer(run, plan, [DivergenceGuard(), recorder, checkpoints])
        try:
            trainer.fit(task, datamodule=data, ckpt_path=plan.resume_from, weights_only=True)
        except (InterruptedRunError, DivergedError) as ending:
            return task.model, ending
        except MisconfigurationException as error:
            raise InputError(f"Lightning refuses these settings: {_one_line(error)}") from error
    return task.model, None


def _trainer(run: RunDirectory, plan: _Plan, callbacks: list[L.Callback]) -> L.Trainer:
    """The trainer of the configuration's group, with this run's callbacks before those of the group callbacks."""
    chosen = [node for node in plan.config.logger.values() if node]
    parts, context = plan.facts["parts"], plan.facts["context"]
    also = accuracy.columns(parts) if parts else positions.columns(context)
    if plan.facts["test"] is not None:
        also += ["test/loss", "test/bits_per_byte", *positions.columns(context, split="test")]
    loggers = [MetricsCSV(run.metrics, also=also, resume_step=plan.step)]
    loggers += [instantiate(node)(save_dir=str(run.path), config=plan.settings) for node in chosen]
    options = {key: value for key, value in plan.settings["trainer"].items() if key != "max_tokens"}
    shown = [instantiate(node) for node in plan.config.callbacks.values() if node]
    options |= OF_EVERY_RUN | {
        "accelerator": plan.device.type,
        "max_steps": plan.steps,
        "default_root_dir": str(run.path),
        # Lightning counts batches here, so that an interval could end within an optimiser step.
        "val_check_interval": options["val_check_interval"] * options["accumulate_grad_batches"],
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in shown),
    }
    try:
        trainer = instantiate(options, callbacks=callbacks + shown, logger=loggers, plugins=[AtomicCheckpointIO()])
    except InstantiationException as error:
        raise InputError(f"Lightning refuses these settings: {_one_line(error.__cause__ or error)}") from error
    if trainer.precision != options["precision"]:  # Lightning may take another, and only warn
        raise InputError(f"trainer.precision={options['precision']} would run as {trainer.precision}: give that.")
    return trainer


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _resume_command(run: RunDirectory) -> str:
    given = given_overrides(without=("resume=",))
    return command("train", *given, override("hydra.run.dir", str(run.path)), "resume=true")
