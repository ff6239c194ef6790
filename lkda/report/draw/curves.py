"""The mean curve of several seeds, and smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lkda.report.read.runs import Run, training_seconds

# With fewer validations than this, the curve of a run is its training loss.
ENOUGH = 4


@dataclass(frozen=True)
class Curve:
    """The mean over seeds, and the smallest and the largest value; all lists have the same length."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def points(run: Run, x: str, y: str) -> dict[float, tuple[float, float]]:
    """{step: (x, y)} of the rows that have both columns, without those of a step that diverged.

    Seconds are those of `training_seconds`.
    """
    found = {}
    for row in (row for row in run.metrics if x in row and y in row):
        at = training_seconds(run, row) if x == "seconds" else row[x]
        if math.isfinite(at) and math.isfinite(row[y]):
            found[row["step"]] = (at, row[y])
    return found


def mean_curve(runs: Sequence[Run], x: str, y: str) -> Curve:
    """The curve over the steps at which every run logged both columns of metrics.csv.

    Where no step is common to all runs, it is the curve of the first run.
    """
    by_step = [points(run, x, y) for run in runs]
    shared = sorted(set(by_step[0]).intersection(*by_step[1:]))
    if not shared:
        by_step, shared = by_step[:1], sorted(by_step[0])
    values = np.array([[rows[step] for rows in by_step] for step in shared]).reshape(len(shared), len(by_step), 2)
    xs, ys = values[..., 0].mean(1), values[..., 1]
    return Curve(xs.tolist(), ys.mean(1).tolist(), ys.min(1).tolist(), ys.max(1).tolist())


def running_mean(curve: Curve) -> Curve:
    """Each point becomes the mean over a window of a fifteenth of the curve, which is narrower at the ends."""
    half = max(1, len(curve.x) // 30)

    def smooth(values: list[float]) -> list[float]:
        return [float(np.mean(values[max(0, n - half) : n + half + 1])) for n in range(len(values))]

    return Curve(curve.x, smooth(curve.y), smooth(curve.low), smooth(curve.high))
