"""Reads run directories: the settings of a run, its results, and its metrics at each step."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lkda import records
from lkda.checks import InputError, refusing_damage
from lkda.metrics_file import MOST_BYTES, metrics_rows
from lkda.old_names import translated_summary, with_data_name
from lkda.perplexity import perplexity
from lkda.report.read.files import read_results_file
from lkda.run_failure import FAILURE

# What tables and plots need. All are numbers, except for the mixer.
REQUIRED = ("mixer", "val/loss", "state_bytes", "tokens", "tokens_per_s", "params")
POSITIVE = ("state_bytes", "tokens", "tokens_per_s", "params")
MAY_BE_MISSING = ("context", "flops_per_token", "unigram_entropy")  # else they are numbers
OF_TEXT, OF_TASKS = "val/bits_per_byte", "val/accuracy"  # one of these is needed too

RECORDED_ROWS = 300
NO_VALIDATION = "no validation at step"  # how the reason begins that a run is left out for


@dataclass(frozen=True)
class Run:
    """A run, finished or as it was at an earlier step.

    Attributes:
        name: the name of its directory; with those above it where others have the same name.
        config: the content of config.yaml.
        summary: the content of summary.json.
        metrics: the rows of metrics.csv, without empty cells.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, float]]


def read_run(directory: Path, *, step: int | None = None) -> Run:
    """Reads a run directory: the run at its end, or as it was at the validation of `step` whether it finished or not.

    Raises: ValueError with the reason where it is not a run directory, not finished, or has no validation at that step.
    """
    if not directory.is_dir():
        raise InputError("not a directory")
    if (directory / FAILURE).is_file():
        raise InputError(f"failed: {_read(directory / FAILURE).strip()}")
    if not (directory / "summary.json").is_file():
        started = (directory / "config.yaml").is_file()
        raise InputError("no summary.json: still running, or killed" if started else "no summary.json: not a run")
    summary = _read_summary(directory / "summary.json", finished=step is None)
    config = _read_config(directory / "config.yaml")
    run = Run(directory.name, config, with_data_name(summary, config), _read_metrics(directory / "metrics.csv"))
    _check_task(run.summary, config)
    if step is None:
        return run
    with refusing_damage("the run's summary.json or metrics.csv"):
        return _at(run, step)


def _at(run: Run, step: int) -> Run:
    """The run as it was after that step, which its summary names as "at_step"."""
    metrics = [row for row in run.metrics if row["step"] <= step]
    validations = [row for row in metrics if row["step"] == step and "val/loss" in row]
    if not validations:
        there = [f"{row['step']:.0f}" for row in run.metrics if "val/loss" in row]
        shown = ", ".join(there if len(there) <= 12 else [*there[:4], "...", *there[-4:]])
        raise InputError(f"{NO_VALIDATION} {step}; there are {shown or 'none at all'}")
    if not _is_number((run.config.get("trainer") or {}).get("max_steps")):
        raise InputError("config.yaml lacks trainer.max_steps")
    then = validations[-1]
    kept = {name: value for name, value in run.summary.items() if not name.startswith("test")}
    summary = kept | {
        name: value for name, value in then.items() if name.startswith(("val/", "test/")) and name.count("/") == 1
    }
    if "test/loss" in then:
        summary["test/perplexity"] = perplexity(then["test/loss"])
    summary |= {"at_step": step, "steps": step, "tokens": int(then["tokens"]), "seconds": then["seconds"]}
    if "val_subsets" in summary:
        summary["val_subsets"] = [subset | _measured_on(subset, then) for subset in summary["val_subsets"]]
        summary["val/perplexity"] = None
    else:
        summary["val/perplexity"] = perplexity(then["val/loss"])
    return Run(run.name, run.config, summary, metrics)


def _measured_on(subset: dict[str, Any], row: dict[str, float]) -> dict[str, float]:
    """What a row of metrics.csv says of a subset of the validation."""
    columns = {metric: f"val/{metric}/{subset['name']}" for metric in ("accuracy", "sequence_accuracy", "loss")}
    return {metric: row[column] for metric, column in columns.items() if column in row}


def _read(path: Path, *, most: int = records.MOST_BYTES) -> str:
    try:
        return records.read_record(path, most=most)
    except FileNotFoundError:
        raise InputError(f"no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from error


def _read_summary(path: Path, *, finished: bool) -> dict[str, Any]:
    text = _read(path)
    try:
        summary = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"summary.json is not JSON ({error})") from error
    if not isinstance(summary, dict):
        raise InputError("summary.json holds no table of values")
    summary = translated_summary(summary)
    _check_summary(summary, finished=finished)
    return summary


def _check_summary(summary: dict[str, Any], *, finished: bool) -> None:
    """Raises: InputError where the run is not finished, or where what tables and plots need is missing."""
    if finished and summary.get("status") != "finished":
        raise InputError(f"the run is {summary.get('status', 'of an unknown status')}, not finished")
    missing = [key for key in REQUIRED if key != "mixer" and not _is_number(summary.get(key))]
    if not _is_number(summary.get(OF_TEXT)) and not ("val_subsets" in summary and _is_number(summary.get(OF_TASKS))):
        missing.append(OF_TEXT)
    if not isinstance(summary.get("mixer"), str):
        missing.insert(0, "mixer")
    if missing:
        raise InputError(f"summary.json lacks {', '.join(missing)}")
    for key in MAY_BE_MISSING:
        if summary.get(key) is not None and not _is_number(summary[key]):
            raise InputError(f"summary.json has {key} = {summary[key]!r}, and a number is needed")
    if isinstance(summary.get("seed"), (list, dict)):
        raise InputError(f"summary.json has seed = {summary['seed']!r}, and a number is needed")
    nothing = [key for key in POSITIVE if not summary[key] > 0]
    if nothing:
        raise InputError(f"summary.json has {nothing[0]} = {summary[nothing[0]]}, and a number above 0 is needed")


def _check_task(summary: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises: InputError where a run of a synthetic task lacks what the table by subset of the validation needs."""
    if not summary.get("val_subsets"):
        return
    missing = [f"summary.json lacks {key}" for key in ("context", "learning_rate") if not _is_number(summary.get(key))]
    missing += [] if isinstance(summary.get("data"), str) else ["summary.json lacks data"]
    model = config.get("model")
    if not isinstance(model, dict) or not _is_number(model.get("d_model")):
        missing.append("config.yaml lacks model.d_model")
    if missing:
        raise InputError("; ".join(missing))
    with refusing_damage("val_subsets of summary.json"):
        for measured in summary["val_subsets"]:
            sizes = [*measured["subset"].values(), measured["subset"]["length"], measured["state_bytes"]]
            shares = [measured["accuracy"], measured["sequence_accuracy"]] if "accuracy" in measured else []
            if not all(map(_is_number, sizes + shares)):
                raise InputError(f"summary.json has a subset of the validation without numbers: {measured}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_config(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        records.check_yaml(text, source=path.name)
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError("config.yaml is not YAML") from error
    _check_config(config)
    return config


def _check_config(config: Any) -> None:
    """Raises: InputError where it is no table of settings, or cannot be written into results.json."""
    if not isinstance(config, dict):
        raise InputError("config.yaml holds no settings")
    for name in ("trainer", "data"):
        if not isinstance(config.get(name) or {}, dict):
            raise InputError(f"config.yaml has {name} = {config[name]!r}, and a section of settings is needed")
    with refusing_damage("config.yaml"):
        json.dumps(config)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    text = _read(path, most=MOST_BYTES)
    try:
        rows = [{name: float(x) for name, x in row.items() if x} for row in metrics_rows(text)]
    except InputError:
        raise
    except (ValueError, TypeError, csv.Error) as error:
        raise InputError(f"metrics.csv cannot be read ({error})") from error
    _check_metrics(rows)
    return rows


def _check_metrics(rows: Sequence[dict[str, float]]) -> None:
    """Raises: InputError where a row has no step or no numbers, or no row is of a validation that did not diverge."""
    if not all(_is_number(row.get("step")) for row in rows):
        raise InputError("metrics.csv has a row without a step")
    if not all(isinstance(value, (int, float)) for row in rows for value in row.values()):
        raise InputError("metrics.csv has a value that is no number")
    needed = ("step", "tokens", "seconds", "val/loss")
    if not any(all(_is_number(row.get(name)) for name in needed) for row in rows):
        raise InputError("metrics.csv holds no validation")


_OF_A_SWEEP = "multirun.yaml"  # Hydra writes it beside the runs; a glob of the runs matches it too


def read_runs(paths: Iterable[Path], *, step: int | None = None) -> tuple[list[Run], list[tuple[Path, str]]]:
    """Reads all directories that are runs, as `read_run` does, and the runs of results.json files of comparisons.

    Returns: the runs, each with a name of its own, and (path, reason) for each path that is left out.
    """
    found: list[tuple[Path, Run]] = []
    skipped = []
    for path in (given := sorted(paths)):
        if path.name == _OF_A_SWEEP and len(given) > 1:
            continue
        try:
            if path.suffix == ".json" and path.is_file():
                found += [(path.absolute().parent / run.name, run) for run in _recorded(path, step)]
            else:
                found.append((path.absolute(), read_run(path, step=step)))
        except ValueError as error:
            skipped.append((path, str(error)))
    names = _names([path for path, _ in found])
    return [replace(run, name=name) for (_, run), name in zip(found, names, strict=True)], skipped


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others: the jobs of every sweep are called 0, 1, ..."""
    names = [path.name for path in paths]
    for parts in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        counts = Counter(names)
        if len(counts) == len(names):
            break
        names = [
            str(Path(*path.parts[-parts:])) if counts[name] > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    return names


def _recorded(path: Path, step: int | None) -> list[Run]:
    """The runs of a comparison, at their end or at the validation of a step."""
    found = read_results_file(path, kind="comparison")
    with refusing_damage(str(path)):
        runs = [from_record(record) for record in found["runs"]]
        if not runs:
            raise InputError("it holds no runs")
        for run in runs:
            _check_summary(run.summary, finished=False)
            _check_config(run.config)
            _check_task(run.summary, run.config)
            _check_metrics(run.metrics)
        return runs if step is None else [_at(run, step) for run in runs]


def as_record(run: Run) -> dict[str, Any]:
    """The run as results.json holds it, with all validations and at most RECORDED_ROWS of the other rows."""
    training = [row for row in run.metrics if "val/loss" not in row]
    every = math.ceil(len(training) / RECORDED_ROWS) or 1
    kept = {id(row) for row in training[every - 1 :: every]}
    metrics = [row for row in run.metrics if "val/loss" in row or id(row) in kept]
    return {"name": run.name, "config": run.config, "summary": run.summary, "metrics": metrics}


def from_record(record: dict[str, Any]) -> Run:
    """The inverse of `as_record`."""
    return Run(str(record["name"]), record["config"], record["summary"], record["metrics"])


def training_seconds(run: Run, row: Mapping[str, float]) -> float:
    """The seconds of training up to a row of metrics.csv, at the median speed of the run.

    The row's own seconds also have the first step, which compiles for some seconds, depending on what an earlier run
    has left in the caches of the machine.
    """
    return row["tokens"] / float(run.summary["tokens_per_s"])


def reported_split(runs: Iterable[Run]) -> str:
    """What figures of these runs are of: "test" where each has measured its test split, else "val"."""
    return "test" if all(_is_number(run.summary.get("test/loss")) for run in runs) else "val"


def tokenizers_differ(runs: Iterable[Run]) -> bool:
    """Whether losses per token cannot be compared: data or unigram entropies differ, the latter with the tokenizer."""
    return len({(run.summary.get("data"), run.summary.get("unigram_entropy")) for run in runs}) > 1
