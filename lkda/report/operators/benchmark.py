"""A benchmark's JSON -> a table, and an operator's time for the table of runs.

The JSON is {"kind": "benchmark", "header": {device, torch, lkda, copy_gb_per_s, date}, "rows": [...]}. A row holds op,
backend or peer (the other absent or None), B, T, H, D, dtype, gate, mode ("fwd" or "fwd+bwd"), replay ("eager" or
"graph"), ms_median, ms_p20, ms_p80, floor_ms, fraction_of_floor, gb_per_s, error, launches, host_us, peak_mib,
registers, shared_bytes, and where nothing was measured, the reason.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lkda.checks import InputError
from lkda.report.draw.tables import markdown_table, rich_table
from lkda.report.draw.units import three
from lkda.report.read.files import read_results_file

Row = dict[str, Any]
KIND = "benchmark"
KEYS = ("op", "B", "T", "H", "D", "dtype", "mode", "replay")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's file."""

    header: dict[str, Any]
    rows: list[Row]

    @property
    def device(self) -> str:
        """Where it ran."""
        return str(self.header.get("device", "an unnamed device"))


def read_benchmark(path: Path) -> Benchmark:
    """Reads the JSON. Raises ValueError where the file is not a benchmark's."""
    found = read_results_file(path, kind=KIND)
    try:
        header, rows = found["header"], found["rows"]
        lacking = [key for row in rows for key in KEYS if key not in row]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a benchmark's JSON ({error}); scripts/benchmark.py writes one.") from error
    if lacking or not rows:
        why = f"a row lacks {lacking[0]}" if lacking else "it has no rows"
        raise InputError(f"{path} is not a benchmark's JSON ({why}); scripts/benchmark.py writes one.")
    return Benchmark(header, rows)


def shape(row: Row) -> str:
    """8x2048x16x64, B x T x H x D."""
    return "x".join(str(row[axis]) for axis in "BTHD")


def implementation(row: Row) -> str:
    """The peer's name, or our backend's."""
    return str(row.get("peer") or f"lkda {row['backend']}")


def measured(rows: Sequence[Row], *, mode: str, replay: str = "eager") -> list[Row]:
    """The rows of one mode that hold a time."""
    return [row for row in rows if row["mode"] == mode and row["replay"] == replay and row.get("ms_median")]


@dataclass(frozen=True)
class _Column:
    heading: str
    write: Callable[[Row], str]


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def _times_the_floor(row: Row) -> str:
    return f"{row['ms_median'] / row['floor_ms']:.2f}" if row.get("floor_ms") else ""


NAMES = (
    _Column("op", lambda row: row["op"]),
    _Column("B x T x H x D", shape),
    _Column("dtype", lambda row: row["dtype"]),
    _Column("gate", lambda row: row.get("gate") or ""),
    _Column("implementation", implementation),
    _Column("mode", lambda row: row["mode"]),
)
NUMBERS = (
    _Column("ms", _number("ms_median", "{:.3f}")),
    _Column("p20-p80", lambda row: f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"),
    _Column("graph ms", _number("graph_ms", "{:.3f}")),
    _Column("x floor", _times_the_floor),
    _Column("GB/s", lambda row: "" if row.get("gb_per_s") is None else three(row["gb_per_s"])),
    _Column("error", _number("error", "{:.1e}")),
    _Column("launches", _number("launches", "{}")),
    _Column("host us", _number("host_us", "{:.0f}")),
    _Column("peak MiB", _number("peak_mib", "{:,.0f}")),
    _Column("registers", _number("registers", "{}")),
    _Column("shared KiB", lambda row: "" if row.get("shared_bytes") is None else f"{row['shared_bytes'] / 1024:.0f}"),
)


def as_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text: a line for each eager row, the replayed graph's time beside it.

    What was not measured keeps its line, with the reason as the last cell. Columns that no row fills are left out.
    """
    graphs = {_key(row): row.get("ms_median") for row in rows if row["replay"] == "graph"}
    eager = [row | {"graph_ms": graphs.get(_key(row))} for row in rows if row["replay"] != "graph"]
    timed = [row for row in eager if row.get("ms_median") is not None]
    names = [column for column in NAMES if any(column.write(row) for row in eager)]
    numbers = [column for column in NUMBERS if any(column.write(row) for row in timed)]
    unmeasured = len(timed) < len(eager)
    head = [column.heading for column in (*names, *numbers)] + (["why not"] if unmeasured else [])
    body = []
    for row in eager:
        has_time = row.get("ms_median") is not None
        cells = [column.write(row) for column in names]
        cells += [column.write(row) if has_time else "" for column in numbers]
        body.append(cells + ([("" if has_time else row.get("reason") or "not said")] if unmeasured else []))
    return head, body


def names_of(head: Sequence[str]) -> int:
    """How many of the table's first columns are names."""
    return sum(column.heading in head for column in NAMES)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "B", "T", "H", "D", "dtype", "gate", "backend", "peer", "mode"))


def as_rich(rows: Sequence[Row]) -> Table:
    """For the terminal: of a reason, its first words, or it leaves the numbers no room."""
    head, body = as_cells(rows)
    if head[-1] == "why not":
        body = [[*line[:-1], line[-1][:32]] for line in body]
    return rich_table(head, body, names=names_of(head))


def as_markdown(rows: Sequence[Row]) -> str:
    """For a page: a pipe table."""
    head, body = as_cells(rows)
    return markdown_table(head, body, names=names_of(head))


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as they are, a column for each entry; of `errors`, one for each tensor."""
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Row) -> Row:
    inner = {f"{key}.{name}": x for key, found in row.items() if isinstance(found, dict) for name, x in found.items()}
    return {key: value for key, value in row.items() if not isinstance(value, dict)} | inner


def kernel_times(rows: Sequence[Row]) -> tuple[str, dict[str, float]]:
    """Forward+backward milliseconds of each op: our fastest backend's, eager, at the largest shape that most ops have.

    Returns: what was timed, in words; op -> milliseconds. Empty where there is no such row.
    """
    at: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    sizes = {}
    for row in measured(rows, mode="fwd+bwd"):
        if row.get("peer"):
            continue
        key = (shape(row), row["dtype"], row["mode"])
        sizes[key] = row["B"] * row["T"] * row["H"] * row["D"]
        at[key][row["op"]] = min(row["ms_median"], at[key].get(row["op"], row["ms_median"]))
    if not at:
        return "", {}
    best = max(at, key=lambda key: (len(at[key]), sizes[key]))
    return f"{best[2]} at {best[0]}, {best[1]}", at[best]
