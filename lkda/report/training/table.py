"""The table of groups of runs, for the terminal, CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lkda.report.draw.units import count, memory
from lkda.report.read.groups import Group
from lkda.report.read.runs import Run, training_seconds


@dataclass(frozen=True)
class Column:
    """A column: its heading, the entry that it shows, the format, and whether the spread over seeds is shown."""

    heading: str
    key: str
    write: Callable[[float], str]
    spread: bool = False


COLUMNS = (
    Column("test loss", "test/loss", "{:.3f}".format, spread=True),
    Column("test bits/byte", "test/bits_per_byte", "{:.3f}".format, spread=True),
    Column("val loss", "val/loss", "{:.3f}".format, spread=True),
    Column("bits/byte", "val/bits_per_byte", "{:.3f}".format, spread=True),
    Column("bits/byte at equal wall-clock", "bits_at_equal_wall_clock", "{:.3f}".format, spread=True),
    Column("accuracy", "val/accuracy", "{:.1%}".format, spread=True),
    Column("whole sequences", "val/sequence_accuracy", "{:.1%}".format, spread=True),
    Column("test perplexity", "test/perplexity", "{:.1f}".format),
    Column("perplexity", "val/perplexity", "{:.1f}".format),
    Column("params", "params", count),
    Column("state", "state_bytes", memory),
    Column("FLOP/token", "flops_per_token", count),
    Column("tokens", "tokens", count),
    Column("tokens/s", "tokens_per_s", count, spread=True),
    Column("kernel ms", "kernel_ms", "{:.3f}".format),
)
# Cannot be compared where runs shared a device.
OF_TIME = ("tokens_per_s",)
# Cannot be compared across tokenizers.
PER_TOKEN = ("val/loss", "val/perplexity", "test/loss", "test/perplexity")

# A run needs this many validations for its loss to be interpolated.
ENOUGH = 3

Row = dict[str, Any]


def rows(
    groups: Sequence[Group],
    *,
    across_tokenizers: bool = False,
    exclusive_device: bool = True,
    kernel_ms: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each group: its label, its number of runs, and each column's mean and, for several runs, deviation.

    Args:
        across_tokenizers: leave out what can only be compared between runs with the same tokenizer.
        exclusive_device: whether no run shared its device. If one did, times are left out.
        kernel_ms: {mixer: forward+backward time of its operator in milliseconds}, from a benchmark.
    """
    table = []
    seconds = equal_wall_clock(groups) if exclusive_device else None
    for group in groups:
        row: Row = {"mixer": group.label, "seeds": len(group.runs)}
        for column in COLUMNS:
            if any(run.summary.get(column.key) is None for run in group.runs):
                continue
            if (across_tokenizers and column.key in PER_TOKEN) or (not exclusive_device and column.key in OF_TIME):
                continue
            row[column.key] = group.mean(column.key)
            if column.spread and len(group.runs) > 1:
                row[f"{column.key} sd"] = statistics.stdev(group.values(column.key))
        if seconds is not None:
            found = [bits_after(run, seconds) for run in group.runs]
            row["bits_at_equal_wall_clock"] = statistics.fmean(found)
            if len(found) > 1:
                row["bits_at_equal_wall_clock sd"] = statistics.stdev(found)
        if kernel_ms is not None and group.mixer in kernel_ms:
            row["kernel_ms"] = kernel_ms[group.mixer]
        table.append(row)
    return table


def equal_wall_clock(groups: Sequence[Group]) -> float | None:
    """Seconds of training that every run reached, which are those of the run that ended first.

    None for fewer than two groups, where devices differ, or where a run has too few validations to interpolate between.
    """
    runs = [run for group in groups for run in group.runs]
    curves = [_bits_by_time(run) for run in runs]
    if len(groups) < 2 or len({run.summary.get("device") for run in runs}) > 1 or min(map(len, curves)) < ENOUGH:
        return None
    seconds = min(curve[-1][0] for curve in curves)
    return seconds if all(curve[0][0] <= seconds for curve in curves) else None


def bits_after(run: Run, seconds: float) -> float:
    """Bits per byte after so many seconds of training, interpolated linearly between validations."""
    times, bits = zip(*_bits_by_time(run))
    return float(np.interp(seconds, times, bits))


def _bits_by_time(run: Run) -> list[tuple[float, float]]:
    name = "val/bits_per_byte"
    return [(training_seconds(run, row), row[name]) for row in run.metrics if name in row]


def _cell(row: Row, column: Column) -> str:
    if column.key not in row:
        return ""
    text = column.write(row[column.key])
    spread = row.get(f"{column.key} sd")
    return text if spread is None else f"{text} ± {column.write(spread)}"


def as_cells(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text. Columns that would be empty are left out.

    A column of the validation is left out too where every row has the same column of the test split.
    """
    columns, several = _shown(table)
    head = ["mixer", *(["seeds"] if several else []), *(column.heading for column in columns)]
    body = [
        [row["mixer"], *([str(row["seeds"])] if several else []), *(_cell(row, column) for column in columns)]
        for row in table
    ]
    return head, body


def as_values(table: Sequence[Row]) -> list[list[float | str | None]]:
    """What the cells of `as_cells` are sorted by: names as text, numbers in full precision, -1 for empty cells."""
    columns, several = _shown(table)
    return [
        [row["mixer"], *([row["seeds"]] if several else []), *(row.get(column.key, -1) for column in columns)]
        for row in table
    ]


def _shown(table: Sequence[Row]) -> tuple[list[Column], bool]:
    """The columns that are not empty, and whether a row has several seeds."""
    tested = [key for key in table[0] if key.startswith("test/") and all(key in row for row in table)] if table else []
    hidden = [key.replace("test/", "val/") for key in tested]
    columns = [c for c in COLUMNS if c.key not in hidden and any(c.key in row for row in table)]
    return columns, any(row["seeds"] > 1 for row in table)


def as_csv(table: Sequence[Row]) -> str:
    """The rows with full-precision numbers, each spread beside its mean."""
    keys = (name for column in COLUMNS for name in (column.key, f"{column.key} sd"))
    names = ["mixer", "seeds", *(name for name in keys if any(name in row for row in table))]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
