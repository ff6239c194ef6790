r"""How models do on texts longer than those of training, from files of `scripts/evaluate.py out=`.

    python -m lkda.report.studies.long_context 'multirun/lm_by_mixer_full/*/text_*.json' \
      'multirun/lm_by_mixer_full/*/needle_*.json' outputs/long_context

The files are evaluations of text, one for each `data.context`, and of `data=needle`. This writes evaluations.json,
table.json, and plots of the loss by position, of bits per byte against the context, and of how much of a hidden passage
is recalled against its distance from the repetition, in a panel for each length of the text. `lkda.report.redraw` draws
them again. An evaluations.json that it wrote before may be among the files: what it holds is added.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from lkda.io import write_atomically
from lkda.report.draw.labels import Label, label_ends
from lkda.report.draw.style import MARKERS, Picture, Style, picture
from lkda.report.draw.units import length
from lkda.report.read.evaluations import Record, evaluations_of_arguments, keep_evaluations, kept_evaluations

KIND = "long_context"
SIZE = (7.2, 4.3)
PANEL, HEIGHT = 2.3, 3.6  # of a panel, in inches
LEGEND = 4  # columns
MOST_TICKS = 10

Points = dict[Any, float]
Lines = dict[str, Points]  # mixer -> {x: the mean over seeds}


def write(records: Sequence[Record], directory: Path) -> None:
    """Writes the table of the evaluations and their plots into `directory`."""
    by_context, by_position = _means(records, _bits), _means(_longest(records), _positions)
    recalled, guessed = _means(records, _recalled), _means(records, _guessed)
    table = _table(by_context, recalled, guessed)
    write_atomically(directory / "table.json", json.dumps(table, indent=1) + "\n")
    trained = sorted({record["run"]["context"] for record in records})
    drawn = {
        "loss_by_position": _picture(by_position, "position in the context (token)", "loss (nats per token)", trained),
        "bits_by_context": _picture(by_context, "context (tokens)", "bits per byte", trained),
        "needle_by_distance": _recall_panels(recalled, guessed),
    }
    for name, image in drawn.items():
        if image is not None:
            write_atomically(directory / f"{name}.png", image.light)


def _bits(record: Record) -> dict[float, float]:
    found = record["result"].get("bits_per_byte")
    return {} if found is None else {record["data"]["context"]: found}


def _positions(record: Record) -> dict[float, float]:
    head = "loss_from_"
    found = {int(name.removeprefix(head)): x for name, x in record["result"].items() if name.startswith(head)}
    return {
        start: loss for start, loss in found.items() if start > 1
    }  # the first tokens are equally hard for every model


def _recalled(record: Record) -> Points:
    """{(length of the text, depth of the passage in percent): accuracy on it}"""
    return {
        (subset["length"], subset["depth"]): accuracy for subset, accuracy in _needles(record) if subset["needles"] > 0
    }


def _guessed(record: Record) -> Points:
    """{length of the text: accuracy where the passage was not hidden in the text before}"""
    return {subset["length"]: accuracy for subset, accuracy in _needles(record) if subset["needles"] == 0}


def _needles(record: Record) -> Iterator[tuple[Mapping[str, int], float]]:
    for measured in record["result"].get("val_subsets", ()):
        if "needles" in measured["subset"] and "accuracy" in measured:
            yield measured["subset"], measured["accuracy"]


def _longest(records: Sequence[Record]) -> list[Record]:
    """The evaluations of text at the longest context."""
    contexts = [record["data"].get("context", 0) for record in records]
    return [record for record, context in zip(records, contexts) if context == max(contexts)]


def _means(records: Sequence[Record], of: Any) -> Lines:
    found: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for x, y in of(record).items():
            found[record["run"]["mixer"]][x].append(y)
    return {
        mixer: {x: statistics.fmean(ys) for x, ys in sorted(points.items())} for mixer, points in sorted(found.items())
    }


def _table(by_context: Lines, recalled: Lines, guessed: Lines) -> dict[str, Any]:
    contexts = sorted({x for line in by_context.values() for x in line})
    lengths = sorted({x for line in recalled.values() for x, _ in line})
    rows = []
    for mixer in sorted({*by_context, *recalled}):
        bits, known, luck = (lines.get(mixer, {}) for lines in (by_context, recalled, guessed))
        row = {"mixer": mixer}
        row |= {f"bits/byte at {length(x)}": f"{bits[x]:.3f}" if x in bits else "" for x in contexts}
        for x in lengths:
            depths = [f"{accuracy:.0%}" for (of, _), accuracy in known.items() if of == x]
            row[f"recalled at {length(x)}"] = f"{' / '.join(depths)} ({luck[x]:.0%})" if depths else ""
        rows.append(row)
    where = " / ".join(f"{depth}%" for depth in sorted({depth for line in recalled.values() for _, depth in line}))
    note = (
        f"Recalled: tokens of a passage that was hidden after {where} of the text. In brackets: without it in the text."
    )
    return {"kind": "table", "rows": rows, "note": note if lengths else ""}


def _recall_panels(recalled: Lines, guessed: Lines) -> Picture | None:
    """A panel for each length of the text: what is recalled against the distance of the passage, a line for each mixer.
    Dotted: without the passage in the text. None where each text has one passage at most."""
    lengths = sorted({of for line in recalled.values() for of, _ in line})
    by_length = {
        of: {mixer: _by_distance(line, of) for mixer, line in recalled.items() if any(x == of for x, _ in line)}
        for of in lengths
    }
    if not any(len(points) > 1 for lines in by_length.values() for points in lines.values()):
        return None

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(PANEL * len(lengths), HEIGHT), layout="constrained")
        panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        colours = style.colours(list(recalled))
        for axes, (of, lines) in zip(panels, by_length.items(), strict=True):
            for n, (mixer, points) in enumerate(lines.items()):
                look = {"color": colours[mixer], "marker": MARKERS[n % len(MARKERS)], "markersize": 5}
                axes.plot(list(points), list(points.values()), label=mixer, **look)
                if of in guessed.get(mixer, {}):
                    axes.axhline(guessed[mixer][of], color=colours[mixer], linewidth=0.9, linestyle=":")
            _length_axis(axes, sorted({x for points in lines.values() for x in points}))
            axes.set_title(f"texts of {length(of)} tokens", fontsize=10)
            axes.set_ylim(0, 1.03)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        panels[0].set_ylabel("tokens of the passage recalled")
        figure.supxlabel("distance of the passage (tokens); dotted: without the passage in the text", fontsize=10)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=LEGEND, frameon=False)
        return figure

    return picture(draw)


def _by_distance(line: Points, of: int) -> Points:
    """{tokens from the passage to its repetition: accuracy} in texts of the length `of`"""
    return dict(sorted((round(of * (100 - depth) / 100), x) for (length, depth), x in line.items() if length == of))


def _length_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """A log axis of tokens, with the given ticks or, where they are too many, powers of 4."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
    powers = [4.0**n for n in range(20) if ticks[0] <= 4.0**n <= ticks[-1]]
    axes.set_xticks(ticks if len(ticks) <= MOST_TICKS else powers)


def _picture(lines: Lines, x: str, y: str, trained: Sequence[int]) -> Picture | None:
    """A line for each mixer on a log axis, with the training contexts marked; None where a line would be one point."""
    if not lines or max(map(len, lines.values())) < 2:
        return None

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        colours = style.colours(list(lines))
        labels = []
        for mixer, points in lines.items():
            axes.plot(list(points), list(points.values()), color=colours[mixer], marker="o", markersize=4.5)
            end, value = list(points.items())[-1]
            labels.append(Label(end, value, f"{mixer}  {value:.3f}", colours[mixer]))
        _length_axis(axes, sorted({x for points in lines.values() for x in points}))
        for context in trained:
            if axes.get_xlim()[0] < context < axes.get_xlim()[1]:
                axes.axvline(context, color=style.faint, linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"{x}; dotted line: context of training" if trained else x)
        axes.set_ylabel(y)
        label_ends(axes, labels)
        return figure

    return picture(draw)


def redraw(path: Path) -> None:
    """Writes the table and plots of kept evaluations beside them. Raises: ValueError where there are none."""
    write(kept_evaluations(path, kind=KIND), path.parent)


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of files, then the directory to write into."""
    try:
        records, out = evaluations_of_arguments(arguments, usage=__doc__)
        keep_evaluations(records, out, kind=KIND)
        write(records, out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{out} holds table.json and the plots")


if __name__ == "__main__":
    main(sys.argv[1:])
