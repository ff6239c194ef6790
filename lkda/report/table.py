"""Groups of runs -> one table, for the terminal, CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lkda.report.runs import Group


@dataclass(frozen=True)
class Column:
    """One column: its heading, the summary's entry it shows, and how a number is written."""

    heading: str
    key: str
    write: Callable[[float], str]
    spread: bool = False


def digits(form: str) -> Callable[[float], str]:
    """A number in the format `form`."""
    return form.format


def count(x: float) -> str:
    """1234567 -> 1.23M"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def memory(x: float) -> str:
    """131072 -> 128 KiB"""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.0f} B"


COLUMNS = (
    Column("val loss", "val/loss", digits("{:.3f}"), spread=True),
    Column("bits/byte", "val/bits_per_byte", digits("{:.3f}"), spread=True),
    Column("perplexity", "val/perplexity", digits("{:.1f}")),
    Column("params", "params", count),
    Column("state", "state_bytes", memory),
    Column("FLOP/token", "flops_per_token", count),
    Column("tokens", "tokens", count),
    Column("tokens/s", "tokens_per_s", count, spread=True),
)

Row = dict[str, Any]


def rows(groups: Sequence[Group], kernel_ms: dict[str, float] | None = None) -> list[Row]:
    """One row a group: its label, its seeds, and mean and (with several seeds) standard deviation of each column.

    Args:
        kernel_ms: forward+backward time of a mixer's operator in milliseconds, from a benchmark, by the mixer's name.
    """
    table = []
    for group in groups:
        row: Row = {"mixer": group.label, "seeds": len(group.runs)}
        for column in COLUMNS:
            if any(column.key not in run.summary for run in group.runs):
                continue
            values = group.values(column.key)
            row[column.key] = statistics.fmean(values)
            if column.spread and len(values) > 1:
                row[f"{column.key} sd"] = statistics.stdev(values)
        if kernel_ms is not None and group.mixer in kernel_ms:
            row["kernel_ms"] = kernel_ms[group.mixer]
        table.append(row)
    return table


def _headings(table: Sequence[Row]) -> list[Column]:
    kernel = Column("kernel ms", "kernel_ms", digits("{:.3f}"))
    return [column for column in (*COLUMNS, kernel) if any(column.key in row for row in table)]


def _cell(row: Row, column: Column) -> str:
    if column.key not in row:
        return ""
    text = column.write(row[column.key])
    spread = row.get(f"{column.key} sd")
    return text if spread is None else f"{text} ± {column.write(spread)}"


def as_lines(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text."""
    columns = _headings(table)
    several = any(row["seeds"] > 1 for row in table)
    head = ["mixer", *(["seeds"] if several else []), *(column.heading for column in columns)]
    body = [
        [row["mixer"], *([str(row["seeds"])] if several else []), *(_cell(row, column) for column in columns)]
        for row in table
    ]
    return head, body


def as_rich(table: Sequence[Row]) -> Table:
    """For the terminal."""
    head, body = as_lines(table)
    shown = Table(header_style="bold", box=None, pad_edge=False)
    for n, heading in enumerate(head):
        shown.add_column(heading, justify="right" if n else "left", no_wrap=True)
    for line in body:
        shown.add_row(*line)
    return shown


def as_markdown(table: Sequence[Row]) -> str:
    """For a page: a pipe table, numbers to the right."""
    head, body = as_lines(table)
    lines = [head, ["---" if n == 0 else "---:" for n in range(len(head))], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(table: Sequence[Row]) -> str:
    """Full numbers, one line a group."""
    names = list(dict.fromkeys(name for row in table for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
