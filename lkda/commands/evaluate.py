"""Measure a trained model on the validation part of its data, or of others."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lkda.commands.harness import run_tasks
from lkda.commands.model_source import TrainedModel, load_trained
from lkda.commands.settings import device_of, plain
from lkda.data.module import IndexedDataModule
from lkda.data.synthetic import check_count
from lkda.models.lm import LanguageModel
from lkda.models.stepwise import StepwiseModel
from lkda.ops.kda.state import STATE_DTYPES
from lkda.report.files import write_atomically
from lkda.training.accuracy import PartMetrics
from lkda.training.positions import PositionLoss
from lkda.training.task import next_token_losses


def evaluate(config: DictConfig) -> dict[str, float]:
    """What `ckpt` makes of the validation: loss, perplexity and bits per byte of text, loss and accuracy of other data;
    or, where `tasks` are given, its scores in those of lm-eval.

    With `stepwise` the model reads token by token, as it decodes, with its states kept in `state_dtype`.

    Args:
        config: composed from configs/evaluate.yaml; `data` is the run's own where it is not given.
    Returns: {"loss", "perplexity", "bits_per_byte", "unigram_entropy", "tokens", "loss_from_0", "loss_from_1",
        "loss_from_2", "loss_from_4", ...: by position}; or as `PartMetrics.compute`; or {"TASK/METRIC": value}.
    Raises:
        ValueError: no usable checkpoint or data, an unknown task, or settings that do not go together.
    """
    plain(config)
    _check(config)
    console = Console(soft_wrap=True, markup=False)
    device = device_of(config.accelerator)
    trained = load_trained(config.ckpt, backend=config.backend)
    trained.model.resolve_backends(device, torch.float32)
    if config.tasks:
        return _tasks(config, trained, device, console)
    data = _data(config, trained)
    model = trained.model.to(device)
    title, state_dtype = f"{trained.path} on {data.source}, validation", None
    if config.stepwise:
        model = StepwiseModel(model, state_dtype=config.state_dtype)
        state_dtype = model.state_dtype
        title += ", stepwise" if state_dtype is None else f", stepwise, states in {state_dtype}"
    result = (_of_parts if data.parts else _of_text)(model, data, device=device, limit=config.max_batches)
    table = Table(title=title, show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    if config.out:
        record = {
            "ckpt": str(trained.path),
            "run": trained.run,
            "data": OmegaConf.to_container(_data_config(config, trained)),
            "stepwise": config.stepwise,
            "state_dtype": state_dtype,
        }
        write_atomically(Path(config.out), json.dumps(record | {"result": result}, indent=1) + "\n")
    return result


def _check(config: DictConfig) -> None:
    if not isinstance(config.stepwise, bool):
        raise ValueError(f"stepwise must be true or false, got {config.stepwise!r}.")
    if config.max_batches is not None:
        check_count("max_batches", config.max_batches, least=1)
    if config.tasks and (config.stepwise or config.max_batches is not None):
        raise ValueError("stepwise and max_batches are for data, which tasks=[...] replaces: give one or the other.")
    if config.state_dtype is None:
        return
    if config.state_dtype not in STATE_DTYPES:
        known = ", ".join(STATE_DTYPES)
        raise ValueError(
            f"state_dtype must be one of {known}, got {config.state_dtype!r}; leave it out for the model's own."
        )
    if not config.stepwise:
        raise ValueError(
            f"state_dtype={config.state_dtype} is how a state is kept from token to token: add stepwise=true."
        )


def _data(config: DictConfig, trained: TrainedModel) -> IndexedDataModule:
    """The data to measure on, prepared; text with the model's own tokenizer."""
    chosen = _data_config(config, trained)
    with tempfile.TemporaryDirectory() as folder:
        own = {}
        if "tokenizer_path" in chosen:
            own = {"tokenizer_path": str(Path(folder) / "tokenizer.json")}
            trained.tokenizer.save(own["tokenizer_path"])
        data = instantiate(chosen, **own)
        data.prepare()
    name = chosen.get("_target_")
    if data.tokenizer is None and trained.vocabulary is not None:
        raise ValueError(f"{trained.path} is a model of text, and {name} has none: give data=...")
    if data.tokenizer is not None and data.tokenizer.to_str() != trained.tokenizer.to_str():
        raise ValueError(
            f"{data.source} was tokenised with another tokenizer than {trained.path} has: give data=files."
        )
    rows = trained.model.config["vocab_size"]
    if data.vocab_size > rows:
        raise ValueError(f"the data have {data.vocab_size} tokens and the model {rows} rows: give the data of its run.")
    return data


def _of_text(
    model: LanguageModel, data: IndexedDataModule, *, device: torch.device, limit: int | None
) -> dict[str, float]:
    assert data.bytes_per_token is not None
    assert data.unigram_entropy is not None
    loss, tokens, by_position = mean_loss(model, _batches(model, data, limit), context=data.context, device=device)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / data.bytes_per_token,
        "unigram_entropy": data.unigram_entropy,
        "tokens": tokens,
        **by_position,
    }


@torch.inference_mode()
def _of_parts(
    model: LanguageModel, data: IndexedDataModule, *, device: torch.device, limit: int | None
) -> dict[str, float]:
    measured = PartMetrics(data.parts, vocab_size=model.config["vocab_size"]).to(device)
    for batch in _batches(model, data, limit):
        on_device = {name: batch[name].to(device) for name in ("tokens", "targets", "asked")}
        measured.measure(model, on_device | {"part": batch["part"]})
    return {name.removeprefix("val/"): float(value) for name, value in measured.compute().items()}


def _batches(model: LanguageModel, data: IndexedDataModule, limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` of the validation, behind a bar that a stepwise model moves with every token."""
    total = data.val_batches if limit is None else min(limit, data.val_batches)
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        if isinstance(model, StepwiseModel):
            model.on_step = lambda share: bar.advance(task, share)
        for done, batch in enumerate(islice(data.val_dataloader(), total), 1):
            yield batch
            bar.update(task, completed=done)


def _tasks(config: DictConfig, trained: TrainedModel, device: torch.device, console: Console) -> dict[str, float]:
    found = run_tasks(trained, list(config.tasks), folder=config.tasks_path, limit=config.limit, device=device)
    result = {f"{task}/{metric}": value for task, values in found.items() for metric, value in values.items()}
    table = Table(title=f"{trained.path}, lm-eval", show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:,.4f}")
    console.print(table)
    return result


@torch.inference_mode()
def mean_loss(
    model: LanguageModel, batches: Iterable[dict[str, Any]], *, context: int, device: torch.device
) -> tuple[float, int, dict[str, float]]:
    """The mean loss in nats over every target of `batches`, their number, and {"loss_from_8": the mean of positions 8
    to 15 of their sequences, ...}."""
    measured = PositionLoss(context).to(device)
    nats, count = 0.0, 0
    for batch in batches:
        tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
        cu_seqlens = None if batch["cu_seqlens"] is None else batch["cu_seqlens"].to(device)
        losses = next_token_losses(model(tokens, cu_seqlens=cu_seqlens), targets)
        measured.update(losses, targets, cu_seqlens)
        nats += float(losses.sum(dtype=torch.float64))
        count += int((targets != -100).sum())
    by_position = {name.replace("val/loss/", "loss_"): float(loss) for name, loss in measured.compute().items()}
    return nats / count, count, by_position


def _data_config(config: DictConfig, trained: TrainedModel) -> DictConfig:
    """The chosen data; where none is chosen, that of the run in whose directory the checkpoint lies, else the default.

    A run's config.yaml is only followed to this project's own data modules: `_target_` names code.
    """
    if "data" in config:
        return config.data
    recorded = trained.path.parent.parent / "config.yaml"
    if not recorded.is_file():
        raise ValueError(f"{trained.path} lies in no run directory that says what data it saw: give data=...")
    data = OmegaConf.load(recorded).data
    if not str(data.get("_target_")).startswith("lkda.data."):
        raise ValueError(f"{recorded} names a data module outside lkda.data ({data.get('_target_')}): give data=...")
    return data
