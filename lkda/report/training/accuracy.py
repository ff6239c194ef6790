"""Accuracy of runs of synthetic tasks on each subset of the validation, each model at its best learning rate."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lkda.report.draw.units import length, memory
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import Run

# What a sweep varies within a row of the table or a line of a plot: task, length, width and learning rate.
SWEPT = {
    *("data", "tokens", "optimizer.lr", "model.d_model", "mixer.num_heads", "scheduler", "device", "precision"),
}
# A subset of the validation: (("length", 256), ("pairs", 64)).
Subset = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Point:
    """A model on a subset of its validation: the mean over seeds, at the learning rate that is best over all subsets.

    Attributes:
        task, context: the task that it was trained on, and the longest length in its training data.
        width: d_model.
        subset: as (("length", 256), ("pairs", 64)).
        accuracy, sequence_accuracy: share of target positions, and of whole sequences, that are right.
        low, high: the smallest and the largest accuracy over seeds.
        state_bytes: of one sequence of the subset's length.
    """

    task: str
    context: int
    width: int
    subset: Subset
    accuracy: float
    sequence_accuracy: float
    low: float
    high: float
    state_bytes: int
    learning_rate: float
    seeds: int


@dataclass(frozen=True)
class Line:
    """One kind of model, named by `label`, at every width and on every task that it was trained with."""

    label: str
    mixer: str
    points: list[Point]


def has_val_subsets(run: Run) -> bool:
    """Whether it is a run of a synthetic task."""
    return bool(run.summary.get("val_subsets"))


def lines(runs: Sequence[Run]) -> list[Line]:
    """The kinds of model, those with the best mean accuracy first."""
    found = [Line(group.label, group.mixer, _points(group.runs)) for group in group_runs(runs, within=SWEPT)]
    return sorted(found, key=lambda line: -statistics.fmean(point.accuracy for point in line.points))


def _points(runs: Sequence[Run]) -> list[Point]:
    models: dict[tuple[str, int, int], dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        what = (str(run.summary["data"]), int(run.summary["context"]), int(run.config["model"]["d_model"]))
        models[what][float(run.summary["learning_rate"])].append(run)
    points = []
    for what, by_rate in sorted(models.items()):
        rate, best = max(by_rate.items(), key=lambda item: _mean(item[1], "val/accuracy"))
        points += _points_of(what, rate, best)
    return points


def _mean(runs: Sequence[Run], key: str) -> float:
    return statistics.fmean(float(run.summary[key]) for run in runs)


def _points_of(what: tuple[str, int, int], rate: float, seeds: Sequence[Run]) -> list[Point]:
    by_subset: dict[Subset, list[dict[str, Any]]] = defaultdict(list)
    for run in seeds:
        for measured in run.summary["val_subsets"]:
            if "accuracy" in measured:
                by_subset[tuple(measured["subset"].items())].append(measured)
    points = []
    for subset, same in sorted(by_subset.items()):
        found = [measured["accuracy"] for measured in same]
        mean, whole = statistics.fmean(found), statistics.fmean(measured["sequence_accuracy"] for measured in same)
        state = int(same[0]["state_bytes"])
        points.append(Point(*what, subset, mean, whole, min(found), max(found), state, rate, len(same)))
    return points


def describe(subset: Subset) -> str:
    """As "64 pairs in 256 tokens", or "256 tokens" for a task without pairs."""
    found = dict(subset)
    pairs = f"{found['pairs']} pairs in " if "pairs" in found else ""
    return f"{pairs}{length(found['length'])} tokens"


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each kind of model, task and width, with a column for each subset.

    Models that were trained on the same task at several lengths share a row. Each column is of the model that was
    trained at that length.
    """
    rows: dict[tuple[str, str, int], dict[Subset, Point]] = defaultdict(dict)
    for line in lines(runs):
        for point in line.points:
            row = rows[point.task, line.label, point.width]
            kept = row.get(point.subset)
            if kept is None or dict(point.subset)["length"] == point.context:
                row[point.subset] = point
    subsets = sorted({subset for row in rows.values() for subset in row})
    several = len({task for task, _, _ in rows}) > 1
    head = [*(["task"] if several else []), "mixer", "d_model", "learning rate", "state", *map(describe, subsets)]
    body = []
    for (task, label, width), row in sorted(rows.items(), key=lambda item: item[0][0]):
        rates = sorted({point.learning_rate for point in row.values()})
        state = [memory(point.state_bytes) for point in row.values()]
        cells = [f"{row[subset].accuracy:.1%}" if subset in row else "" for subset in subsets]
        size = state[0] if len(set(state)) == 1 else f"{state[0]} to {state[-1]}"
        named = [*([task] if several else []), label, str(width), ", ".join(f"{rate:g}" for rate in rates), size]
        body.append(named + cells)
    return head, body


def records(found: Sequence[Line]) -> list[dict[str, Any]]:
    """The points as data of a chart; see `lkda.report.tradeoff.charts.recall`."""
    return [
        {"series": line.label, "mixer": line.mixer, "x": point.state_bytes, "y": point.accuracy, "width": point.width}
        | {"setting": f"{point.task}: {describe(point.subset)}", "rate": point.learning_rate, "seeds": point.seeds}
        for line in found
        for point in line.points
    ]
