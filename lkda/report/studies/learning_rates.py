"""The best learning rate of each mixer: runs.json of docs/results/learning_rates_* -> table.json and a plot beside it.

The file holds runs of one or more sizes of model. Each run names its model, its mixer, its peak learning rate and what
its validation measured; `measures` names the measure of each size: bits_per_byte, or loss in nats per token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lkda.checks import InputError
from lkda.report.draw.labels import Label, label_ends
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.read.files import read_results_file, write_atomically

KIND = "learning_rates"
_AXES = {"bits_per_byte": "validation, bits per byte", "loss": "validation loss, nats per token"}

Run = Mapping[str, Any]


def redraw(path: Path) -> None:
    """Writes table.json and loss_by_rate.png beside a file of runs. Raises: ValueError where it is of another kind."""
    found = read_results_file(path, kind=KIND)
    try:
        table = {"kind": "table", "rows": rows(found["runs"], found["measures"]), "note": found["note"]}
        plot = _plot(found["runs"], found["measures"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a file of runs at several learning rates ({error!r}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "loss_by_rate.png", plot.light)


def rows(runs: Sequence[Run], measures: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each model and mixer, a column for each rate. The best of a row is in bold.

    Args:
        measures: by model: bits_per_byte or loss.
    """
    rates = sorted({run["learning_rate"] for run in runs})
    made = []
    for model, measure in measures.items():
        for mixer, found in _by_mixer(runs, model, measure).items():
            cells = {rate: f"{value:.3f}" for rate, value in found.items()}
            cells[_best(found)] = f"**{cells[_best(found)]}**"
            made.append({"model": model, "mixer": mixer} | {_written(rate): cells.get(rate, "") for rate in rates})
    return made


def _by_mixer(runs: Sequence[Run], model: str, measure: str) -> dict[str, dict[float, float]]:
    """Of each mixer in that model, the mean over the runs of each rate, by rising rate."""
    values: dict[str, dict[float, list[float]]] = {}
    for run in sorted(runs, key=lambda run: run["learning_rate"]):
        if run["model"] == model:
            values.setdefault(run["mixer"], {}).setdefault(run["learning_rate"], []).append(run[measure])
    order = dict.fromkeys(run["mixer"] for run in runs if run["model"] == model)
    return {mixer: {rate: sum(x) / len(x) for rate, x in values[mixer].items()} for mixer in order}


def _written(rate: float) -> str:
    """0.0028 as 2.8e-3."""
    return f"{1000 * rate:g}e-3"


def _best(found: Mapping[float, float]) -> float:
    return min(found, key=lambda rate: found[rate])


def _plot(runs: Sequence[Run], measures: Mapping[str, str]) -> Picture:
    """A panel for each model: validation against the peak learning rate, a curve per mixer with its best ringed."""

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(5.2 * len(measures), 4.2), layout="constrained")
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for panel, (model, measure) in zip(panels, measures.items(), strict=True):
            curves = _by_mixer(runs, model, measure)
            colours = style.colours(list(curves))
            for mixer, found in curves.items():
                panel.plot(list(found), list(found.values()), "o-", markersize=4, color=colours[mixer])
                best = _best(found)
                panel.plot(best, found[best], "o", markersize=9, fillstyle="none", color=colours[mixer])
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(FixedLocator(sorted({rate for found in curves.values() for rate in found})))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: _written(rate)))
            panel.set_xlabel(f"peak learning rate, model={model}")
            panel.set_ylabel(_AXES[measure])
            ends = {mixer: (list(found)[-1], list(found.values())[-1]) for mixer, found in curves.items()}
            label_ends(panel, [Label(x, y, mixer, colours[mixer]) for mixer, (x, y) in ends.items()])
        return figure

    return picture(draw)
