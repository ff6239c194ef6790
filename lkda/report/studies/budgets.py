"""How mixers compare after different numbers of training tokens, and after equal time, from run directories.

    python -m lkda.report.studies.budgets 'multirun/lm_by_mixer/*' 'multirun/lm_by_mixer_full/*' outputs/budgets

Each run has a schedule of its own length. Comparing such runs after equal time is fairer than reading a run in the
middle of its schedule, before its learning rate has fallen. The time of a run is its tokens divided by the tokens per
second of the fastest run of its mixer, so one run of each mixer needs its device to itself. Between two lengths of a
mixer, bits per byte are interpolated linearly in the logarithm of the time.

This writes runs.json, which holds what was read, table.json and a plot. `lkda.report.redraw` makes the last two again.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.labels import Label, label_ends
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.draw.units import count, three
from lkda.report.read.comparable import check_one_run_each, check_same_text
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import Run as TrainedRun
from lkda.report.read.runs import reported_split
from lkda.report.studies.from_runs import print_rows, write_study

KIND = "budgets"
SIZE = (7.2, 4.3)

Run = Mapping[str, Any]
Curve = list[tuple[float, float]]  # (seconds of training, bits per byte), means over seeds, by rising time


def collect(runs: Sequence[TrainedRun]) -> dict[str, Any]:
    """The content of runs.json.

    Raises: InputError for runs that are not of the same text and device, or that differ in more than their mixer, seed
        and tokens.
    """
    if not runs:
        raise InputError("none of the directories is that of a finished run.")
    if any(run.summary.get("val/bits_per_byte") is None for run in runs):
        raise InputError("the runs must be of text, with bits per byte.")
    for what in ("data", "device"):
        found = sorted({str(run.summary.get(what)) for run in runs})
        if len(found) > 1:
            raise InputError(f"the runs must have the same {what} to be compared; got {', '.join(found)}.")
    split = reported_split(runs)
    name = {"test": "test", "val": "validation"}[split]
    check_same_text(((run.summary.get("fingerprint"), run.name) for run in runs), split=name)
    check_one_run_each(
        ((run.summary["mixer"], run.summary["tokens"], run.summary.get("seed")), run.name) for run in runs
    )
    return {
        "kind": KIND,
        "split": name,
        "device": runs[0].summary.get("device"),
        "runs": [
            {name: run.summary.get(name) for name in ("mixer", "seed", "tokens", "tokens_per_s", "params")}
            | {"bits_per_byte": run.summary[f"{split}/bits_per_byte"], "name": run.name}
            for run in runs
        ],
    }


def rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """A row for each mixer, the best at the most tokens first. A cell of a number of tokens that was not run is empty.

    A cell has the mean over runs and, for several, the standard deviation. The best of a column is in bold.
    """
    budgets = sorted({run["tokens"] for run in runs})
    mixers = list(dict.fromkeys(run["mixer"] for run in runs))
    found = {mixer: {tokens: _values(runs, mixer, tokens) for tokens in budgets} for mixer in mixers}
    seconds = equal_time(runs)
    after = {mixer: bits_after(curve_of(runs, mixer), seconds) for mixer in mixers}
    best = {
        tokens: _least(statistics.fmean(own[tokens]) for own in found.values() if own[tokens]) for tokens in budgets
    }

    def rank(mixer: str) -> tuple[float, ...]:
        return tuple(statistics.fmean(found[mixer][n]) if found[mixer][n] else float("inf") for n in reversed(budgets))

    made = []
    for mixer in sorted(mixers, key=rank):
        row = {"mixer": mixer}
        row |= {f"{count(n)} tokens": _cell(found[mixer][n], best[n]) for n in budgets}
        row |= {f"after {three(seconds)} s": _marked(after[mixer], _least(x for x in after.values() if x is not None))}
        made.append(row | {"tokens/s": count(_speed(runs, mixer))})
    return made


def equal_time(runs: Sequence[Run]) -> float:
    """The seconds of training after which mixers are compared: those of the most tokens for the fastest mixer."""
    most = max(run["tokens"] for run in runs)
    return min(most / _speed(runs, mixer) for mixer in {run["mixer"] for run in runs if run["tokens"] == most})


def curve_of(runs: Sequence[Run], mixer: str) -> Curve:
    """Bits per byte of a mixer against its seconds of training, one point for each number of tokens."""
    speed = _speed(runs, mixer)
    budgets = sorted({run["tokens"] for run in runs if run["mixer"] == mixer})
    return [(tokens / speed, statistics.fmean(_values(runs, mixer, tokens))) for tokens in budgets]


def bits_after(curve: Curve, seconds: float) -> float | None:
    """Bits per byte after so many seconds; None outside the measured times."""
    times, bits = zip(*curve)
    if not times[0] <= seconds <= times[-1]:
        return None
    return float(np.interp(np.log(seconds), np.log(times), bits))


def _values(runs: Sequence[Run], mixer: str, tokens: int) -> list[float]:
    return [run["bits_per_byte"] for run in runs if run["mixer"] == mixer and run["tokens"] == tokens]


def _speed(runs: Sequence[Run], mixer: str) -> float:
    """Tokens per second, of the fastest run of the mixer."""
    return float(max(run["tokens_per_s"] for run in runs if run["mixer"] == mixer))


def _least(values: Any) -> float:
    return min(values, default=float("nan"))


def _cell(values: Sequence[float], best: float) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return _marked(statistics.fmean(values), best) + spread


def _marked(value: float | None, best: float) -> str:
    if value is None:
        return ""
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def _note(found: Mapping[str, Any]) -> str:
    runs = found["runs"]
    seeds = "; ".join(
        f"{count(tokens)} tokens: {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")
        for tokens in sorted({run["tokens"] for run in runs})
        for counts in [[len(_values(runs, mixer, tokens)) for mixer in {run["mixer"] for run in runs}]]
    )
    return (
        f"Bits per byte of the {found['split']} split. Runs of each mixer: {seeds}. ± is the standard deviation over "
        f"seeds. After {three(equal_time(runs))} s: after equal time of training, that of the most tokens for the "
        f"fastest mixer; interpolated linearly in the logarithm of the time between complete runs. {found['device']}."
    )


def _plot(runs: Sequence[Run]) -> Picture:
    """Bits per byte against the time of training, a line for each mixer."""
    lines = {mixer: curve_of(runs, mixer) for mixer in dict.fromkeys(run["mixer"] for run in runs)}

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        colours = style.colours(list(lines))
        labels = []
        for mixer, curve in lines.items():
            axes.plot(*zip(*curve), color=colours[mixer], marker="o", markersize=4.5)
            labels.append(Label(*curve[-1], f"{mixer}  {curve[-1][1]:.3f}", colours[mixer]))
        axes.set_xscale("log")
        times = [seconds for curve in lines.values() for seconds, _ in curve]
        axes.xaxis.set_major_locator(FixedLocator([min(times), equal_time(runs), max(times)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: three(value)))
        axes.axvline(equal_time(runs), color=style.faint, linewidth=0.8, linestyle=":")
        axes.set_xlabel("seconds of training; dotted line: equal time")
        axes.set_ylabel("bits per byte")
        label_ends(axes, labels)
        return figure

    return picture(draw)


def redraw(path: Path) -> None:
    """Writes table.json and bits_by_time.png beside a file of runs. Raises: ValueError where it is of another kind."""
    found = read_results_file(path, kind=KIND)
    try:
        table = {"kind": "table", "rows": rows(found["runs"]), "note": _note(found)}
        plot = _plot(found["runs"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a file of runs with several numbers of tokens ({error!r}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "bits_by_time.png", plot.light)


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of run directories, then the directory to write into."""
    found, out = write_study(arguments, usage=__doc__, collect=collect, redraw=redraw)
    print_rows(rows(found["runs"]))
    print(f"{out} holds runs.json, table.json and the plot")


if __name__ == "__main__":
    main(sys.argv[1:])
