"""Reads a benchmark's JSON and makes tables of it.

The JSON is {"kind": "benchmark", "header": {device, torch, lkda, copy_gb_per_s, date}, "rows": [...]}. A row holds op,
backend or peer (the other is absent or None), B, T, H, D, dtype, gate, mode ("fwd" or "fwd+bwd"), replay ("eager" or
"graph"), ms_median, ms_p20, ms_p80, noisy, lower_bound_ms, fraction_of_lower_bound, gb_per_s, error, launches, host_us,
peak_mib, registers and shared_bytes; or the reason why nothing was measured.

The time of an eager call includes the time that the host needs to launch the kernels. The replay of a CUDA graph
measures the device alone, so it is the operator's time wherever there is one.
"""

from __future__ import annotations

import csv
import io
import re
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
    """The content of a benchmark's file."""

    header: dict[str, Any]
    rows: list[Row]

    @property
    def device(self) -> str:
        """The device that it ran on."""
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
    """B x T x H x D, as in 8x2048x16x64."""
    return "x".join(str(row[axis]) for axis in "BTHD")


def implementation(row: Row) -> str:
    """What was measured, in words: a function of another library, or a backend of lkda."""
    return str(row.get("peer") or f"lkda {row['backend']}")


def why_not(row: Row) -> str:
    """The reason why nothing was measured, without the name of the class of an error of the caller."""
    return re.sub(r"^(ValueError|InputError): ", "", str(row.get("reason") or ""))


def measured(rows: Sequence[Row], *, mode: str, replay: str) -> list[Row]:
    """The rows of one mode and way of calling that hold a time."""
    return [row for row in rows if row["mode"] == mode and row["replay"] == replay and row.get("ms_median")]


def device_times(rows: Sequence[Row], *, mode: str) -> list[Row]:
    """One row for each measurement of a mode: the replayed graph's, or the eager one where no graph was measured."""
    found = {_key(row): row for replay in ("eager", "graph") for row in measured(rows, mode=mode, replay=replay)}
    return list(found.values())


@dataclass(frozen=True)
class _Column:
    heading: str
    write: Callable[[Row], str]


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else form.format(row[key])


def _milliseconds(key: str) -> Callable[[Row], str]:
    """Of the row at `key`, the eager or the graph's: 0.200, or 2.135 (noisy)."""

    def write(row: Row) -> str:
        timed = row[key]
        return "" if timed is None else f"{timed['ms_median']:.3f}{' (noisy)' if timed.get('noisy') else ''}"

    return write


def _times_the_lower_bound(row: Row) -> str:
    return f"{row['ms_median'] / row['lower_bound_ms']:.2f}" if row.get("lower_bound_ms") else ""


NAMES = (
    _Column("op", lambda row: row["op"]),
    _Column("B x T x H x D", shape),
    _Column("dtype", lambda row: row["dtype"]),
    _Column("gate", lambda row: row.get("gate") or ""),
    _Column("implementation", implementation),
    _Column("mode", lambda row: row["mode"]),
)
NUMBERS = (
    _Column("graph ms", _milliseconds("graph")),
    _Column("eager ms", _milliseconds("eager")),
    _Column("p20-p80 ms", lambda row: f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"),
    _Column("x lower bound", _times_the_lower_bound),
    _Column("GB/s", lambda row: "" if row.get("gb_per_s") is None else three(row["gb_per_s"])),
    _Column("error", _number("error", "{:.1e}")),
    _Column("launches", _number("launches", "{}")),
    _Column("host us", _number("host_us", "{:.0f}")),
    _Column("peak MiB", _number("peak_mib", "{:,.0f}")),
    _Column("registers", _number("registers", "{}")),
    _Column("shared KiB", lambda row: "" if row.get("shared_bytes") is None else f"{row['shared_bytes'] / 1024:.0f}"),
)


def as_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text: a line for each implementation, shape and mode.

    The percentiles, the distance to the lower bound and the bandwidth are those of the replayed graph where there is
    one, else of the eager call. A line without a measurement has the reason as its last cell. Columns that would be
    empty are left out.
    """
    lines = _lines(rows)
    timed = [row for row in lines if row.get("ms_median") is not None]
    names = [column for column in NAMES if any(column.write(row) for row in lines)]
    numbers = [column for column in NUMBERS if any(column.write(row) for row in timed)]
    unmeasured = len(timed) < len(lines)
    head = [column.heading for column in (*names, *numbers)] + (["why not"] if unmeasured else [])
    body = []
    for row in lines:
        has_time = row.get("ms_median") is not None
        cells = [column.write(row) for column in names]
        cells += [column.write(row) if has_time else "" for column in numbers]
        body.append(cells + ([("" if has_time else why_not(row) or "not said")] if unmeasured else []))
    return head, body


_OF_THE_TIMING = ("ms_median", "ms_p20", "ms_p80", "gb_per_s")


def _lines(rows: Sequence[Row]) -> list[Row]:
    """A row for each line of the table: what only the eager call measures, with the timing of the graph, if any."""
    by_replay: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_replay[_key(row)][row["replay"]] = row
    lines = []
    for found in by_replay.values():
        timed = {name: row if row.get("ms_median") is not None else None for name, row in found.items()}
        graph, eager = timed.get("graph"), timed.get("eager")
        line = found.get("eager") or found["graph"]
        timing = {name: graph[name] for name in _OF_THE_TIMING if name in graph} if graph else {}
        lines.append(line | timing | {"graph": graph, "eager": eager})
    return lines


def names_of(head: Sequence[str]) -> int:
    """How many of the first columns of the table are names."""
    return sum(column.heading in head for column in NAMES)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "B", "T", "H", "D", "dtype", "gate", "backend", "peer", "mode"))


def as_rich(rows: Sequence[Row]) -> Table:
    """For the terminal. Reasons are cut, because long ones would leave no room for the numbers."""
    head, body = as_cells(rows)
    if head[-1] == "why not":
        body = [[*line[:-1], line[-1][:32]] for line in body]
    return rich_table(head, body, names=names_of(head))


def as_markdown(rows: Sequence[Row]) -> str:
    """For a page: a Markdown table."""
    head, body = as_cells(rows)
    return markdown_table(head, body, names=names_of(head))


def as_csv(rows: Sequence[Row]) -> str:
    """All rows, with a column for each entry. `errors` has a column for each tensor."""
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
    """Forward+backward time of each operator's fastest lkda backend, at the largest shape that most operators share.

    Returns: what was timed, in words, and {op: milliseconds}. Both are empty where there is no such row.
    """
    at: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    sizes = {}
    for row in device_times(rows, mode="fwd+bwd"):
        if row.get("peer"):
            continue
        key = (shape(row), row["dtype"], row["mode"])
        sizes[key] = row["B"] * row["T"] * row["H"] * row["D"]
        at[key][row["op"]] = min(row["ms_median"], at[key].get(row["op"], row["ms_median"]))
    if not at:
        return "", {}
    best = max(at, key=lambda key: (len(at[key]), sizes[key]))
    return f"{best[2]} at {best[0]}, {best[1]}", at[best]
