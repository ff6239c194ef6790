"""Run directories as they lie on disk: what a run was and how it went."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a table or a plot cannot do without.
REQUIRED = ("mixer", "val/loss", "val/bits_per_byte", "state_bytes", "tokens", "tokens_per_s", "params")
# What tells two groups of runs apart besides the mixer, where it differs between them.
DISTINGUISHING = ("model", "data", "context", "learning_rate", "tokens", "backend", "device")


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        summary: what summary.json holds.
        metrics: the rows of metrics.csv, numbers, only the columns that a row fills.
    """

    directory: Path
    summary: dict[str, Any]
    metrics: list[dict[str, float]]

    def curve(self, x: str, y: str) -> tuple[list[float], list[float]]:
        """The rows that hold both columns."""
        rows = [row for row in self.metrics if x in row and y in row]
        return [row[x] for row in rows], [row[y] for row in rows]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: the mixer, and what tells this group from the other groups of that mixer.
    """

    label: str
    mixer: str
    runs: list[Run]

    def values(self, key: str) -> list[float]:
        """That entry of each run's summary."""
        return [float(run.summary[key]) for run in self.runs]


def read_run(directory: Path) -> Run:
    """Reads a run directory. Raises ValueError with the reason why it is none, or not yet one."""
    if not directory.is_dir():
        raise ValueError("not a directory")
    summary_path = directory / "summary.json"
    if not summary_path.is_file():
        started = (directory / "config.yaml").is_file() and (directory / "metrics.csv").is_file()
        raise ValueError("no summary.json: still running, or killed" if started else "no summary.json: not a run")
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"summary.json is not JSON ({error})") from error
    if not isinstance(summary, dict):
        raise ValueError("summary.json holds no table of values")
    if summary.get("status") != "finished":
        raise ValueError(f"the run is {summary.get('status', 'of an unknown status')}, not finished")
    missing = [key for key in REQUIRED if not isinstance(summary.get(key), (int, float, str))]
    if missing:
        raise ValueError(f"summary.json lacks {', '.join(missing)}")
    return Run(directory, summary, _read_metrics(directory / "metrics.csv"))


def _read_metrics(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        raise ValueError("no metrics.csv")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"metrics.csv cannot be read ({error})") from error


def read_runs(directories: Iterable[Path]) -> tuple[list[Run], list[tuple[Path, str]]]:
    """All that are runs, and the others, each with the reason why it is left out."""
    runs, skipped = [], []
    for directory in sorted(directories):
        try:
            runs.append(read_run(directory))
        except ValueError as error:
            skipped.append((directory, str(error)))
    return runs, skipped


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Runs that differ in their seed alone together, best loss first."""
    runs = list(runs)
    varying = [key for key in DISTINGUISHING if len({_plain(run, key) for run in runs if key in run.summary}) > 1]
    # A backend or a token count that follows from the mixer says nothing more than the mixer's name.
    varying = [key for key in varying if not _determined_by_mixer(runs, key)]
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[(str(run.summary["mixer"]), *(_plain(run, key) for key in varying))].append(run)
    labelled = [
        Group(" · ".join([mixer, *(_show(key, value) for key, value in zip(varying, values))]), mixer, members)
        for (mixer, *values), members in groups.items()
    ]
    return sorted(labelled, key=lambda group: sum(group.values("val/loss")) / len(group.runs))


def _plain(run: Run, key: str) -> str:
    return str(run.summary.get(key, ""))


def _determined_by_mixer(runs: list[Run], key: str) -> bool:
    seen: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        seen[str(run.summary["mixer"])].add(_plain(run, key))
    return all(len(values) == 1 for values in seen.values())


def _show(key: str, value: str) -> str:
    short = {"learning_rate": "lr", "tokens_per_s": "tok/s"}.get(key, key)
    return value if key in ("model", "data", "backend", "device") else f"{short} {value}"


def tokenizers_differ(runs: Iterable[Run]) -> bool:
    """Whether losses a token do not compare: other data, or another unigram entropy, which another tokenizer gives."""
    return len({(_plain(run, "data"), _plain(run, "unigram_entropy")) for run in runs}) > 1
