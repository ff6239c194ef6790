"""Measure a trained model on the validation split or the test split of its own data, or of other data."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lkda.checks import InputError, check_count, check_values
from lkda.commands.command_line.invocation import typed_overrides
from lkda.commands.lm_eval_adapter import run_tasks
from lkda.commands.run.checkpoint_loading import TrainedModel, config_of_run, load_trained
from lkda.commands.run.sequence_memory import check_sequence_memory
from lkda.commands.settings.config import resolve
from lkda.commands.settings.data_options import build_data, check_data_options
from lkda.commands.settings.paths import data_with_absolute_paths
from lkda.commands.settings.unused_options import EVALUATE, check_unused
from lkda.data.datamodule import IndexedDataModule
from lkda.data.fingerprint import NAMES, differences, in_words
from lkda.data.random_tokens import RandomTokens
from lkda.data.text.cache import expanded
from lkda.data.text.packed import PackedDataModule
from lkda.device import one_cpu_thread, physical_memory, resolve_device
from lkda.io import check_output_file, write_atomically
from lkda.models.lm import LanguageModel
from lkda.models.stepwise import StepwiseModel
from lkda.ops.kda.state import STATE_DTYPES
from lkda.perplexity import TOO_LARGE, perplexity
from lkda.training import positions
from lkda.training.accuracy import METRICS, by_subset
from lkda.training.losses import next_token_losses
from lkda.training.precision import PRECISIONS as DTYPES
from lkda.training.source_loss import SourceLoss
from lkda.training.validation import ValidationMetrics

SPLITS = ("validation", "test")
_FROM = "loss_from_"  # and the first position of a range: a name of the result
PRECISIONS = ("32-true", "bf16-mixed")  # of the computation; the weights are float32
OPTIONS = {
    "ckpt": Path,
    "seed": int,
    "accelerator": str,
    "backend": str,
    "precision": str,
    "out": Path | None,
    "stepwise": bool,
    "state_dtype": str | None,
    "split": str,
    "max_batches": int | None,
    "tasks": Sequence[str],
    "tasks_path": Path | None,
    "limit": int | None,
}


@dataclass(frozen=True)
class EvaluationPlan:
    """The checked options of an evaluation, as configs/evaluate.yaml names them.

    Attributes:
        data: the resolved group `data`; None means the data of the run.
    """

    ckpt: str
    accelerator: str
    backend: str
    precision: str
    out: str | None
    stepwise: bool
    state_dtype: str | None
    split: str
    max_batches: int | None
    tasks: list[str]
    tasks_path: str | None
    limit: int | None
    data: dict[str, Any] | None


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Measure the model in `ckpt` on the validation split, or with split=test on the test split.

    For text the results are loss, perplexity and bits per byte; for other data, loss and accuracy. If `tasks` are
    given, the results are the scores in these lm-eval tasks instead. With `stepwise` the model reads one token at a
    time, as in decoding, and stores its states in `state_dtype`.

    Args:
        config: composed from configs/evaluate.yaml; without `data`, the data of the run are used.
    Returns: {"loss", "perplexity", "bits_per_byte", "unigram_entropy", "tokens", "loss_from_0", "loss_from_1",
        "loss_from_2", "loss_from_4", ...: by position} of text, and of a prepared corpus "by_source": {source: {"loss",
        "bits_per_byte", "tokens"}}; {"accuracy", "sequence_accuracy", "loss",
        "val_subsets": see `by_subset`} of other data; {"TASK/METRIC": value} of tasks.
    Raises:
        InputError: for a checkpoint or data that cannot be used, an unknown task, or settings that contradict each
            other.
    """
    plan = plan_evaluation(config)
    console = Console(soft_wrap=True, markup=False, emoji=False)
    device = resolve_device(plan.accelerator)
    trained = load_trained(plan.ckpt, backend=plan.backend)
    dtype = DTYPES[plan.precision]
    backends = trained.model.resolve_backends(device, dtype)
    if plan.tasks:
        result = _tasks(plan, trained, device, console)
        ran: dict[str, Any] = {"tasks": plan.tasks, "tasks_path": plan.tasks_path, "limit": plan.limit}
        _write(plan, trained, result, device, ran | {"backend": backends})
        return result
    chosen = _data_options(plan, trained)
    data = _data(chosen, trained, device=device, limit=plan.max_batches)
    if plan.split == "test" and data.test is None:
        why = f": {data.no_test}" if data.no_test is not None else ""
        raise InputError(f"{data.source} has no test split{why}. Leave split=test out for the validation.")
    changed = differences(trained.fingerprint, data.fingerprint)
    if changed:
        message = f"{in_words(changed)} of {data.source} are not those of the run that trained {trained.path}"
        seen = plan.split == "test" and NAMES["train"] in changed
        also = ", which may have seen some of the test split in training" if seen else ""
        console.print(f"note: {message}{also}.", highlight=False, markup=False, emoji=False)
    model = trained.model.to(device)
    title, state_dtype = f"{trained.path} on {data.source}, {plan.split}", None
    if plan.stepwise:
        model = StepwiseModel(model, state_dtype=plan.state_dtype)
        state_dtype = model.state_dtype
        title += ", stepwise" if state_dtype is None else f", stepwise, states in {state_dtype}"
    with one_cpu_thread(device), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = _measure(model, data, split=plan.split, device=device, limit=plan.max_batches)
    table = Table(title=Text(title), show_header=False)
    for name, value in _lines(result):
        table.add_row(name, _shown(value))
    console.print(table)
    ran = {
        "data": chosen,
        "fingerprint": dict(data.fingerprint),
        "differs_from_the_run": changed,
        "split": plan.split,
        "stepwise": plan.stepwise,
        "state_dtype": state_dtype,
        "max_batches": plan.max_batches,
        # A stepwise model calls the step form of the operators, which has no option `backend`.
        "backend": None if plan.stepwise else backends,
    }
    _write(plan, trained, result, device, ran)
    return result


def _write(
    plan: EvaluationPlan, trained: TrainedModel, result: dict[str, Any], device: torch.device, ran: dict[str, Any]
) -> None:
    """Write the results and the settings as JSON into `out`, if given. Raises OSError if it cannot be written."""
    if plan.out is None:
        return
    record = {
        "kind": "evaluation",
        "ckpt": str(trained.path.absolute()),
        "step": trained.step,
        "run": trained.run,
        **ran,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(DTYPES[plan.precision]).removeprefix("torch."),
        "result": result,
    }
    out = expanded(plan.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(record, indent=1) + "\n")


def plan_evaluation(config: DictConfig) -> EvaluationPlan:
    """Resolve and check the configuration. Raises InputError for settings that are wrong or contradict each other."""
    if _is_random(OmegaConf.select(config, "data")):
        raise InputError(
            "data=random cannot be measured: its tokens are independent of each other, so that nothing can be "
            "predicted. Choose other data, or leave data=random out for the data of the run."
        )
    settings = resolve(config)
    check_values(settings, OPTIONS)
    check_unused(EVALUATE, settings)
    plan = EvaluationPlan(
        ckpt=settings["ckpt"],
        accelerator=settings["accelerator"],
        backend=settings["backend"],
        precision=settings["precision"],
        out=settings["out"],
        stepwise=settings["stepwise"],
        state_dtype=settings["state_dtype"],
        split=settings["split"],
        max_batches=settings["max_batches"],
        tasks=settings["tasks"],
        tasks_path=settings["tasks_path"],
        limit=settings["limit"],
        data=settings.get("data"),
    )
    _check(plan)
    return plan


def _check(plan: EvaluationPlan) -> None:
    if plan.split not in SPLITS:
        raise InputError(f"split must be {' or '.join(SPLITS)}, got {plan.split!r}.")
    if plan.precision not in PRECISIONS:
        raise InputError(f"precision must be {' or '.join(PRECISIONS)}, got {plan.precision!r}.")
    if plan.max_batches is not None:
        check_count("max_batches", plan.max_batches, least=1)
    if plan.limit is not None:
        check_count("limit", plan.limit, least=1)
    for_data: dict[str, Any] = {"stepwise": plan.stepwise or None, "max_batches": plan.max_batches, "data": plan.data}
    for_data["split"] = plan.split if plan.split != "validation" else None
    for_data["precision"] = plan.precision if plan.precision != PRECISIONS[0] else None
    for_tasks = {"tasks_path": plan.tasks_path, "limit": plan.limit}
    unused = [name for name, value in (for_data if plan.tasks else for_tasks).items() if value is not None]
    if unused and plan.tasks:
        message = f"{unused[0]} has no effect with tasks=[...], which are measured in place of data"
        raise InputError(f"{message}: leave out one of the two.")
    if unused:
        raise InputError(f"{unused[0]} has an effect only with tasks=[...]: name some tasks, or leave it out.")
    if plan.stepwise and plan.backend != "auto":
        raise InputError(
            f"backend={plan.backend} is for whole sequences, but stepwise=true reads one token at a time: leave out "
            "one of the two."
        )
    if plan.stepwise and plan.precision != PRECISIONS[0]:
        raise InputError(
            f"precision={plan.precision} is for whole sequences, but stepwise=true reads one token at a time in "
            f"{PRECISIONS[0]}: leave out one of the two."
        )
    if plan.out is not None:
        check_output_file(expanded(plan.out), option="out")
    if plan.state_dtype is None:
        return
    if plan.state_dtype not in STATE_DTYPES:
        known = ", ".join(STATE_DTYPES)
        raise InputError(
            f"state_dtype must be one of {known}, got {plan.state_dtype!r}; leave it out to use the model's own."
        )
    if not plan.stepwise:
        raise InputError(
            f"state_dtype={plan.state_dtype} has an effect only when the model reads one token at a time: add "
            "stepwise=true."
        )


def _data(
    chosen: dict[str, Any], trained: TrainedModel, *, device: torch.device, limit: int | None
) -> IndexedDataModule:
    """The data to measure on, prepared. Text is tokenized with the model's own tokenizer.

    Args:
        chosen: the resolved group `data`.
        limit: the largest number of batches to measure; the bytes of a text are those of these batches.
    """
    check_data_options(chosen)
    with tempfile.TemporaryDirectory() as folder:
        own = {}
        if "tokenizer_path" in chosen:
            path = Path(folder) / "tokenizer.json"
            write_atomically(path, trained.tokenizer.to_str())
            own = {"tokenizer_path": str(path)}
        data = build_data(chosen | own)
        width = trained.model.config["d_model"]
        check_sequence_memory(data, chosen, width=width, device=device, limit=limit, available=physical_memory())
        if limit is not None and isinstance(data, PackedDataModule):
            data.measure_at_most(limit)
        data.prepare()
    name = chosen.get("_target_")
    if data.tokenizer is None and trained.vocabulary is not None:
        raise InputError(f"{trained.path} is a model of text, but the data of {name} are not text: give data=files.")
    if data.tokenizer is not None and data.tokenizer.to_str() != trained.tokenizer.to_str():
        raise InputError(
            f"{data.source} was tokenized with another tokenizer than that of {trained.path}: give data=files."
        )
    rows = trained.model.config["vocab_size"]
    if data.vocab_size > rows:
        raise InputError(f"the data need {data.vocab_size} rows, but the model has {rows}: give the data of its run.")
    return data


@torch.inference_mode()
def _measure(
    model: LanguageModel, data: IndexedDataModule, *, split: str, device: torch.device, limit: int | None
) -> dict[str, Any]:
    """What `evaluate` returns for data."""
    text = data.test if split == "test" else data
    assert text is not None
    metrics = ValidationMetrics(
        context=data.context,
        vocab_size=model.config["vocab_size"],
        bytes_per_token=text.bytes_per_token,
        val_subsets=data.val_subsets,
    ).to(device)
    sources = SourceLoss(data.test.sources if split == "test" and data.test else data.val_sources, device)

    def token_losses(tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        losses = next_token_losses(model(tokens, cu_seqlens=cu_seqlens), targets)
        sources.update(losses, targets)
        return losses

    for batch in _batches(model, data, split, limit):
        metrics.update(model, {name: _on(device, value) for name, value in batch.items()}, token_losses=token_losses)
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
        "perplexity": perplexity(found["val/loss"]),
        "bits_per_byte": found["val/bits_per_byte"],
        "unigram_entropy": text.unigram_entropy,
        "tokens": tokens,
        **{column.replace("val/loss/from_", _FROM): found[column] for column in by_position if column in found},
        **({"by_source": sources.compute()} if sources.sources else {}),
    }


def _position_ranges(result: Iterable[str]) -> dict[str, str]:
    """What to print for loss_from_2, loss_from_4 and so on: "loss, positions 2 to 3". The last range has no end."""
    starts = [int(name.removeprefix(_FROM)) for name in result if name.startswith(_FROM)]
    found = {}
    for first, after in zip(starts, [*starts[1:], None]):
        if after is None:
            where = f"from position {first}"
        else:
            where = f"position {first}" if after == first + 1 else f"positions {first} to {after - 1}"
        found[f"{_FROM}{first}"] = f"loss, {where}"
    return found


def _shown(value: float | None) -> str:
    """A result in the table. The perplexity of a model that predicts very badly is no number."""
    if value is None:
        return TOO_LARGE
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """The names and values of all results, those of the subsets last."""
    ranges = _position_ranges(result)
    for name, value in result.items():
        if name not in ("val_subsets", "by_source"):
            yield ranges.get(name, name.replace("_", " ")), value
    for source, measured in result.get("by_source", {}).items():
        yield f"bits per byte, {source}", measured["bits_per_byte"]
    for record in result.get("val_subsets", ()):
        words = ", ".join(f"{name} {value}" for name, value in record["subset"].items())
        yield from ((f"{metric.replace('_', ' ')}, {words}", record[metric]) for metric in METRICS if metric in record)


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _batches(model: LanguageModel, data: IndexedDataModule, split: str, limit: int | None) -> Iterator[dict[str, Any]]:
    """The first `limit` batches of the split, with a progress bar. A stepwise model advances the bar at every token."""
    loader = data.in_order(data.test.batches) if split == "test" and data.test is not None else data.val_dataloader()
    total = len(loader) if limit is None else min(limit, len(loader))
    with Progress(transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        if isinstance(model, StepwiseModel):
            model.on_step = lambda share: bar.advance(task, share)
        for done, batch in enumerate(islice(loader, total), 1):
            yield batch
            bar.update(task, completed=done)


def _tasks(plan: EvaluationPlan, trained: TrainedModel, device: torch.device, console: Console) -> dict[str, float]:
    found = run_tasks(trained, plan.tasks, folder=plan.tasks_path, limit=plan.limit, device=device)
    result = {f"{task}/{metric}": value for task, values in found.items() for metric, value in values.items()}
    table = Table(title=Text(f"{trained.path}, lm-eval"), show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:,.4f}")
    console.print(table)
    return result


def _data_options(plan: EvaluationPlan, trained: TrainedModel) -> dict[str, Any]:
    """The chosen group `data`, resolved. If none is chosen, the group with which the model was trained.

    A recorded `_target_` names code. It is therefore accepted only if it is a data module of lkda.

    Raises: InputError if no data are recorded, or if their module is not one of lkda's.
    """
    if plan.data is not None:
        unused = [word for word in typed_overrides() if word.startswith(("data.tokenizer_path=", "data.vocab_size="))]
        if unused and "tokenizer_path" in plan.data:
            raise InputError(f"text is always measured with the model's own tokenizer: leave out {unused[0]}.")
        return data_with_absolute_paths(plan.data)
    data = config_of_run(trained).get("data")
    if not isinstance(data, dict):
        where = "is in no run directory that records" if trained.step is not None else "does not record"
        raise InputError(f"{trained.path} {where} what data it was trained on: give data=...")
    _check_data_module(data, trained.path)
    if _is_random(data):
        raise InputError(
            f"{trained.path} was trained on data=random, whose tokens are independent of each other, so that nothing "
            "can be predicted: give data=... to measure it on other data."
        )
    return data_with_absolute_paths(data)


def _is_random(data: Mapping[str, Any] | None) -> bool:
    """Whether a group `data` is that of random tokens. Its other settings need not be resolved."""
    return data is not None and data.get("_target_") == f"{RandomTokens.__module__}.{RandomTokens.__name__}"


def _check_data_module(data: dict[str, Any], source: Path) -> None:
    """Raises InputError unless the recorded settings build one of lkda's own data modules, and nothing else."""
    module, _, name = str(data.get("_target_")).rpartition(".")
    found = None
    if module.startswith("lkda.data."):
        with suppress(ImportError):
            found = getattr(import_module(module), name, None)
    for_hydra = re.findall(r"'(_\w+_)':", str(data))  # keys, at any depth, that `instantiate` would act on
    if not (isinstance(found, type) and issubclass(found, IndexedDataModule)) or for_hydra != ["_target_"]:
        raise InputError(
            f"the data recorded in {source} use {module}.{name}, which is not a data module of lkda: give data=..."
        )
