"""Measure a trained model on the validation or the test split of its data, or of others."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lkda.checks import InputError, check_count, check_values
from lkda.commands.checkpoint_loading import TrainedModel, config_of_run, load_trained
from lkda.commands.config import resolve
from lkda.commands.data_options import build_data, check_data_options
from lkda.commands.invocation import typed_overrides
from lkda.commands.lm_eval_adapter import run_tasks
from lkda.commands.paths import data_with_absolute_paths
from lkda.commands.unused_options import EVALUATE, check_unused
from lkda.data.datamodule import IndexedDataModule
from lkda.data.fingerprint import NAMES, differences, in_words
from lkda.data.text.cache import expanded
from lkda.device import resolve_device
from lkda.io import check_output_file, write_atomically
from lkda.models.lm import LanguageModel
from lkda.models.stepwise import StepwiseModel
from lkda.ops.kda.state import STATE_DTYPES
from lkda.training import positions
from lkda.training.accuracy import METRICS, by_subset
from lkda.training.validation import ValidationMetrics

SPLITS = ("validation", "test")
PRECISION = torch.float32  # of the weights and of what is computed
OPTIONS = {
    "ckpt": Path,
    "seed": int,
    "accelerator": str,
    "backend": str,
    "out": Path | None,
    "stepwise": bool,
    "state_dtype": str | None,
    "split": str,
    "max_batches": int | None,
    "tasks": Sequence[str],
    "tasks_path": Path | None,
    "limit": int | None,
}


def evaluate(config: DictConfig) -> dict[str, Any]:
    """What `ckpt` makes of the validation or, with split=test, of the test split: loss, perplexity and bits per byte of
    text, loss and accuracy of other data; or, where `tasks` are given, its scores in those of lm-eval.

    With `stepwise` the model reads token by token, as it decodes, with its states kept in `state_dtype`.

    Args:
        config: composed from configs/evaluate.yaml; `data` is the run's own where it is not given.
    Returns: {"loss", "perplexity", "bits_per_byte", "unigram_entropy", "tokens", "loss_from_0", "loss_from_1",
        "loss_from_2", "loss_from_4", ...: by position} of text; {"accuracy", "sequence_accuracy", "loss",
        "val_subsets": see `by_subset`} of other data; {"TASK/METRIC": value} of tasks.
    Raises:
        ValueError: no usable checkpoint or data, an unknown task, or settings that do not go together.
    """
    settings = resolve(config)
    _check(config, settings)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    device = resolve_device(config.accelerator)
    trained = load_trained(config.ckpt, backend=config.backend)
    backends = trained.model.resolve_backends(device, PRECISION)
    if config.tasks:
        result = _tasks(config, trained, device, console)
        ran = {name: settings[name] for name in ("tasks", "tasks_path", "limit")}
        _write(config, trained, result, device, ran | {"backend": backends})
        return result
    chosen = _data_options(settings, trained)
    data = _data(chosen, trained)
    if config.split == "test" and data.test is None:
        why = f": {data.no_test}" if data.no_test is not None else ""
        raise InputError(f"{data.source} has no test split{why}. Leave split=test out for the validation.")
    changed = differences(trained.fingerprint, data.fingerprint)
    if changed:
        told = f"{in_words(changed)} of {data.source} are not those of the run that trained {trained.path}"
        seen = config.split == "test" and NAMES["train"] in changed
        also = ", which may have seen some of the test split in training" if seen else ""
        console.print(f"note: {told}{also}.", highlight=False, markup=False, emoji=False)
    model = trained.model.to(device)
    title, state_dtype = f"{trained.path} on {data.source}, {config.split}", None
    if config.stepwise:
        model = StepwiseModel(model, state_dtype=config.state_dtype)
        state_dtype = model.state_dtype
        title += ", stepwise" if state_dtype is None else f", stepwise, states in {state_dtype}"
    result = _measure(model, data, split=config.split, device=device, limit=config.max_batches)
    table = Table(title=Text(title), show_header=False)
    for name, value in _lines(result):
        table.add_row(name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    ran = {
        "data": chosen,
        "fingerprint": dict(data.fingerprint),
        "differs_from_the_run": changed,
        "split": config.split,
        "stepwise": config.stepwise,
        "state_dtype": state_dtype,
        "max_batches": config.max_batches,
        # A model that reads token by token calls the operators' steps, which have no option `backend`.
        "backend": None if config.stepwise else backends,
    }
    _write(config, trained, result, device, ran)
    return result


def _write(
    config: DictConfig, trained: TrainedModel, result: dict[str, Any], device: torch.device, ran: dict[str, Any]
) -> None:
    """What was measured and how, as JSON into `out`, if given. Raises OSError where it cannot be written."""
    if config.out is None:
        return
    record = {
        "kind": "evaluation",
        "ckpt": str(trained.path.absolute()),
        "step": trained.step,
        "run": trained.run,
        **ran,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(PRECISION).removeprefix("torch."),
        "result": result,
    }
    out = expanded(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(record, indent=1) + "\n")


def _check(config: DictConfig, settings: dict[str, Any]) -> None:
    check_values(settings, OPTIONS)
    check_unused(EVALUATE, settings)
    if config.split not in SPLITS:
        raise InputError(f"split must be {' or '.join(SPLITS)}, got {config.split!r}.")
    if config.max_batches is not None:
        check_count("max_batches", config.max_batches, least=1)
    if config.limit is not None:
        check_count("limit", config.limit, least=1)
    for_data = {"stepwise": config.stepwise or None, "max_batches": config.max_batches, "data": config.get("data")}
    for_data["split"] = config.split if config.split != "validation" else None
    for_tasks = {"tasks_path": config.tasks_path, "limit": config.limit}
    unused = [name for name, value in (for_data if config.tasks else for_tasks).items() if value is not None]
    if unused and config.tasks:
        told = f"{unused[0]} is not for tasks=[...], which are measured in place of data"
        raise InputError(f"{told}: give one or the other.")
    if unused:
        raise InputError(f"{unused[0]} is for tasks=[...]: name some, or leave it out.")
    if config.stepwise and config.backend != "auto":
        raise InputError(
            f"backend={config.backend} is how whole sequences are computed, and stepwise=true reads token by token: "
            "leave one of them out."
        )
    if config.out is not None:
        check_output_file(expanded(config.out), option="out")
    if config.state_dtype is None:
        return
    if config.state_dtype not in STATE_DTYPES:
        known = ", ".join(STATE_DTYPES)
        raise InputError(
            f"state_dtype must be one of {known}, got {config.state_dtype!r}; leave it out for the model's own."
        )
    if not config.stepwise:
        raise InputError(
            f"state_dtype={config.state_dtype} is how a state is kept from token to token: add stepwise=true."
        )


def _data(chosen: dict[str, Any], trained: TrainedModel) -> IndexedDataModule:
    """The data to measure on, prepared; text with the model's own tokenizer.

    Args:
        chosen: the resolved group `data`.
    """
    check_data_options(chosen)
    with tempfile.TemporaryDirectory() as folder:
        own = {}
        if "tokenizer_path" in chosen:
            path = Path(folder) / "tokenizer.json"
            write_atomically(path, trained.tokenizer.to_str())
            own = {"tokenizer_path": str(path)}
        data = build_data(chosen | own)
        data.prepare()
    name = chosen.get("_target_")
    if data.tokenizer is None and trained.vocabulary is not None:
        raise InputError(f"{trained.path} is a model of text, and {name} has none: give data=...")
    if data.tokenizer is not None and data.tokenizer.to_str() != trained.tokenizer.to_str():
        raise InputError(
            f"{data.source} was tokenised with another tokenizer than {trained.path} has: give data=files."
        )
    rows = trained.model.config["vocab_size"]
    if data.vocab_size > rows:
        raise InputError(f"the data have {data.vocab_size} tokens and the model {rows} rows: give the data of its run.")
    return data


@torch.inference_mode()
def _measure(
    model: LanguageModel, data: IndexedDataModule, *, split: str, device: torch.device, limit: int | None
) -> dict[str, Any]:
    """What `evaluate` returns of data."""
    text = data.test if split == "test" else data
    assert text is not None
    metrics = ValidationMetrics(
        context=data.context,
        vocab_size=model.config["vocab_size"],
        bytes_per_token=text.bytes_per_token,
        val_subsets=data.val_subsets,
    ).to(device)
    for batch in _batches(model, data, split, limit):
        metrics.update(model, {name: _on(device, value) for name, value in batch.items()})
    tokens = int(metrics.count)
    found = {name: float(value) for name, value in metrics.compute().items()}
    if data.val_subsets:
        return {metric: found[f"val/{metric}"] for metric in METRICS} | {
            "val_subsets": by_subset(data.val_subsets, found)
        }
    assert text.unigram_entropy is not None
    by_position = positions.columns(data.context)
    return {
        "loss": found["val/loss"],
        "perplexity": math.exp(found["val/loss"]),
        "bits_per_byte": found["val/bits_per_byte"],
        "unigram_entropy": text.unigram_entropy,
        "tokens": tokens,
        **{column.replace("val/loss/", "loss_"): found[column] for column in by_position if column in found},
    }


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of everything that was measured, those of the subsets last."""
    for name, value in result.items():
        if name != "val_subsets":
            yield name.replace("_", " "), value
    for record in result.get("val_subsets", ()):
        words = ", ".join(f"{name} {value}" for name, value in record["subset"].items())
        yield from ((f"{metric.replace('_', ' ')}, {words}", record[metric]) for metric in METRICS if metric in record)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _batches(model: LanguageModel, data: IndexedDataModule, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` of the split, behind a bar that a stepwise model moves with every token."""
    loader = data.in_order(data.test.batches) if split == "test" and data.test is not None else data.val_dataloader()
    total = len(loader) if limit is None else min(limit, len(loader))
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        if isinstance(model, StepwiseModel):
            model.on_step = lambda share: bar.advance(task, share)
        for done, batch in enumerate(islice(loader, total), 1):
            yield batch
            bar.update(task, completed=done)


def _tasks(config: DictConfig, trained: TrainedModel, device: torch.device, console: Console) -> dict[str, float]:
    found = run_tasks(trained, list(config.tasks), folder=config.tasks_path, limit=config.limit, device=device)
    result = {f"{task}/{metric}": value for task, values in found.items() for metric, value in values.items()}
    table = Table(title=Text(f"{trained.path}, lm-eval"), show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:,.4f}")
    console.print(table)
    return result


def _data_options(settings: dict[str, Any], trained: TrainedModel) -> dict[str, Any]:
    """The chosen data, as the resolved group; where none is chosen, those that the model was trained on.

    What a run or an exported directory records is only followed to this project's own data modules: `_target_` names
    code. Raises: ValueError where nothing is recorded, or another module.
    """
    if "data" in settings:
        unused = [word for word in typed_overrides() if word.startswith(("data.tokenizer_path=", "data.vocab_size="))]
        if unused and "tokenizer_path" in settings["data"]:
            raise InputError(f"text is measured with the model's own tokenizer: leave out {unused[0]}.")
        return data_with_absolute_paths(settings["data"])
    data = config_of_run(trained).get("data")
    if not isinstance(data, dict):
        where = "lies in no run directory that says" if trained.step is not None else "does not say"
        raise InputError(f"{trained.path} {where} what data it saw: give data=...")
    _check_data_module(data, trained.path)
    return data_with_absolute_paths(data)


def _check_data_module(data: dict[str, Any], source: Path) -> None:
    """Raises: ValueError where recorded settings would make anything but one of lkda.data's own modules."""
    module, _, name = str(data.get("_target_")).rpartition(".")
    found = None
    if module.startswith("lkda.data."):
        with suppress(ImportError):
            found = getattr(import_module(module), name, None)
    for_hydra = re.findall(r"'(_\w+_)':", str(data))  # keys, at any depth, that `instantiate` acts on
    if not (isinstance(found, type) and issubclass(found, IndexedDataModule)) or for_hydra != ["_target_"]:
        raise InputError(
            f"the data that {source} records are of no data module of lkda ({module}.{name}): give data=..."
        )
