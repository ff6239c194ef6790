"""The best learning rate of each mixer, from run directories.

    python -m lkda.report.studies.learning_rates 'multirun/learning_rates_small/*' outputs/learning_rates

This writes runs.json, which holds what was read, table.json and a plot. `lkda.report.redraw` makes the last two again.

runs.json holds runs of one or more sizes of model. Each run names its model, its mixer, its peak learning rate and what
its validation measured; `measures` names the measure of each size: bits_per_byte, or loss in nats per token. Runs of
the same size with other numbers of tokens count as another size, "small, 70.8M tokens".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import Run as TrainedRun
from lkda.report.studies.from_runs import print_rows, write_study

KIND = "learning_rates"
MOST_COLUMNS = 2  # panels side by side
LABEL_RATIO = 1.4  # labels of rates that are closer would touch
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
    """A row for each model and mixer, a column for each rate. The best of a row is in bold; "optimum" says whether it
    is inside the rates of that row, or at their edge, so that a rate beyond may be better.

    Args:
        measures: by model: bits_per_byte or loss.
    """
    rates = sorted({run["learning_rate"] for run in runs})
    made = []
    for model, measure in measures.items():
        for mixer, found in _by_mixer(runs, model, measure).items():
            cells = {rate: f"{value:.3f}" for rate, value in found.items()}
            cells[_best(found)] = f"**{cells[_best(found)]}**"
            values = {_written(rate): cells.get(rate, "") for rate in rates}
            made.append({"model": model, "mixer": mixer} | values | {"optimum": "inside" if _inside(found) else "edge"})
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


def _inside(found: Mapping[float, float]) -> bool:
    """Whether rates were measured on both sides of the best."""
    return min(found) < _best(found) < max(found)


def _below_each_other(rates: Sequence[float]) -> list[str]:
    """The labels of rates on a logarithmic axis. One that is close to the label before it is a line lower."""
    labels: list[str] = []
    for before, rate in zip([0.0, *rates], rates):
        close = before > 0 and rate < LABEL_RATIO * before and not labels[-1].startswith("\n")
        labels.append("\n" * close + _written(rate))
    return labels


def _plot(runs: Sequence[Run], measures: Mapping[str, str]) -> Picture:
    """A panel for each model: validation against the peak learning rate, a curve per mixer. Its best is ringed, by a
    square if it is at the edge of the rates.

    The curves end at different rates. Lines to labels beside a panel would cross them, so a legend names the curves.
    """
    columns = min(len(measures), MOST_COLUMNS)
    down = -(-len(measures) // columns)
    mixers = list(dict.fromkeys(run["mixer"] for run in runs))

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(4.8 * columns, 3.2 * down + 1.0), layout="constrained")
        panels, colours = figure.subplots(down, columns, squeeze=False).flatten(), style.colours(mixers)
        for panel, (model, measure) in zip(panels, measures.items()):
            curves = _by_mixer(runs, model, measure)
            for mixer, found in curves.items():
                panel.plot(list(found), list(found.values()), "o-", markersize=4, color=colours[mixer])
                best = _best(found)
                ring = "o" if _inside(found) else "s"
                panel.plot(best, found[best], ring, markersize=9, fillstyle="none", color=colours[mixer])
            panel.set_xscale("log")
            rates = sorted({rate for found in curves.values() for rate in found})
            panel.xaxis.set_major_locator(FixedLocator(rates))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FixedFormatter(_below_each_other(rates)))
            panel.tick_params(labelsize=8)
            panel.set_title(f"model={model}", fontsize=10, loc="left")
            panel.set_xlabel("peak learning rate")
            panel.set_ylabel(_AXES[measure])
        for panel in panels[len(measures) :]:
            panel.set_axis_off()
        handles = [Line2D([], [], color=colours[mixer], marker="o", markersize=4, label=mixer) for mixer in mixers]
        for ring, words in (("o", "best"), ("s", "best, at the edge of the grid")):
            mark = Line2D([], [], color=style.faint, marker=ring, markersize=9, fillstyle="none", linestyle="none")
            mark.set_label(words)
            handles.append(mark)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
        return figure

    return picture(draw)


def collect(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """The content of runs.json for finished runs of text.

    Raises: InputError where there are none, or where some are not of text.
    """
    if not runs:
        raise InputError("there are no finished runs: give run directories, or a pattern that matches some.")
    without = [run.name for run in runs if run.summary.get("val/bits_per_byte") is None]
    if without:
        raise InputError(f"{without[0]} has no bits per byte: give runs on text.")
    data = sorted({f"{run.summary['data']} at {run.summary['context']} tokens" for run in runs})
    shortest = {run.summary["model"]: run.summary["tokens"] for run in sorted(runs, key=lambda run: -_tokens(run))}
    found = [
        {
            "model": run.summary["model"] + (f", {_tokens(run) / 1e6:.1f}M tokens" if longer else ""),
            **{name: run.summary[name] for name in ("mixer", "learning_rate", "tokens", "seed", "clipped_share")},
            "bits_per_byte": run.summary["val/bits_per_byte"],
            "loss": run.summary["val/loss"],
        }
        for run in runs
        for longer in [_tokens(run) > shortest[run.summary["model"]]]
    ]
    budgets = "; ".join(f"model={model}: {tokens / 1e6:.1f}M tokens" for model, tokens in sorted(shortest.items()))
    seeds = len({run.summary["seed"] for run in runs})
    devices = ", ".join(sorted({str(run.summary["device"]) for run in runs}))
    note = (
        f"Validation, bits per byte, at the end of the run. {budgets}, unless said otherwise. Data: {', '.join(data)}."
    )
    note += f" {seeds} seed{'s' * (seeds > 1)}. {devices}, {runs[0].summary['precision']}."
    return {
        "kind": KIND,
        "note": note,
        "measures": dict.fromkeys(sorted({run["model"] for run in found}), "bits_per_byte"),
        "runs": found,
    }


def _tokens(run: TrainedRun) -> int:
    return int(run.summary["tokens"])


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of run directories, then the directory to write into."""
    found, out = write_study(arguments, usage=__doc__, collect=collect, redraw=redraw)
    print_rows(rows(found["runs"], found["measures"]))
    print(f"{out} holds runs.json, table.json and the plot")


if __name__ == "__main__":
    main(sys.argv[1:])
