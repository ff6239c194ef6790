"""Runs of synthetic tasks -> accuracy by part of the validation, each model at the better of its learning rates."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lkda.report.draw.units import length, memory
from lkda.report.read.groups import group_runs
from lkda.report.read.runs import Run

# What a sweep varies inside one row of a table or one line of a plot: the task, its length, the width and the rate.
SWEPT = {
    *("data", "tokens", "optimizer.lr", "model.d_model", "mixer.num_heads", "scheduler", "device", "precision"),
}
# What a point of a line is made of, beside what the part of the validation says of itself.
Shape = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Point:
    """A model on a part of its validation, the mean over seeds at the learning rate that is best over all parts.

    Attributes:
        task, context: what it was trained on, and the longest length of it.
        width: d_model.
        shape: of the part, as (("length", 256), ("pairs", 64)).
        accuracy, sequence_accuracy: of asked tokens, and of whole sequences.
        low, high: the least and the greatest accuracy over seeds.
        state_bytes: of one sequence at the part's length.
    """

    task: str
    context: int
    width: int
    shape: Shape
    accuracy: float
    sequence_accuracy: float
    low: float
    high: float
    state_bytes: int
    learning_rate: float
    seeds: int


@dataclass(frozen=True)
class Line:
    """One kind of model at every width and on every task that it was trained with; `label` names it."""

    label: str
    mixer: str
    points: list[Point]


def has_parts(runs: Sequence[Run]) -> bool:
    """Whether all of them are runs of synthetic tasks."""
    return all("parts" in run.summary for run in runs)


def lines(runs: Sequence[Run]) -> list[Line]:
    """The kinds of model, those that are best in the mean first."""
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
    parts: dict[Shape, list[dict[str, float]]] = defaultdict(list)
    for run in seeds:
        for part in run.summary["parts"]:
            if "accuracy" in part:
                shape = tuple((name, part[name]) for name in part if name in ("length", "pairs"))
                parts[shape].append(part)
    points = []
    for shape, same in sorted(parts.items()):
        found = [part["accuracy"] for part in same]
        mean, whole = statistics.fmean(found), statistics.fmean(part["sequence_accuracy"] for part in same)
        state = int(same[0]["state_bytes"])
        points.append(Point(*what, shape, mean, whole, min(found), max(found), state, rate, len(same)))
    return points


def describe(shape: Shape) -> str:
    """As "64 pairs in 256"; "256" of a task without pairs."""
    found = dict(shape)
    pairs = f"{found['pairs']} pairs in " if "pairs" in found else ""
    return pairs + length(found["length"])


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each kind of model, task and width, its accuracy on each part in a column.

    Where a task's models were trained at several lengths, those stand in one row, each at the length it was trained at.
    """
    rows: dict[tuple[str, str, int], dict[Shape, Point]] = defaultdict(dict)
    for line in lines(runs):
        for point in line.points:
            row = rows[point.task, line.label, point.width]
            kept = row.get(point.shape)
            if kept is None or dict(point.shape)["length"] == point.context:
                row[point.shape] = point
    shapes = sorted({shape for row in rows.values() for shape in row})
    several = len({task for task, _, _ in rows}) > 1
    head = [*(["task"] if several else []), "mixer", "d_model", "rate", "state", *map(describe, shapes)]
    body = []
    for (task, label, width), row in sorted(rows.items(), key=lambda item: item[0][0]):
        rates = sorted({point.learning_rate for point in row.values()})
        state = [memory(point.state_bytes) for point in row.values()]
        cells = [f"{row[shape].accuracy:.1%}" if shape in row else "" for shape in shapes]
        size = state[0] if len(set(state)) == 1 else f"{state[0]} to {state[-1]}"
        named = [*([task] if several else []), label, str(width), ", ".join(f"{rate:g}" for rate in rates), size]
        body.append(named + cells)
    return head, body
