"""Groups of runs -> one table, for the terminal, CSV, Markdown and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from lkda.report.runs import Group


@dataclass(frozen=True)
class Column:
    """One column: its heading, the summary's entry it shows, and how a number is written."""

    heading: str
    key: str
    form: str
    spread: bool = False


COLUMNS = (
    Column("val loss", "val/loss", "{:.3f}", spread=True),
    Column("bits/byte", "val/bits_per_byte", "{:.3f}", spread=True),
    Column("perplexity", "val/perplexity", "{:.1f}"),
    Column("parameters", "params", "{:,.0f}"),
    Column("state bytes", "state_bytes", "{:,.0f}"),
    Column("MFLOP/token", "flops_per_token", "{:.2f}"),
    Column("tokens", "tokens", "{:,.0f}"),
    Column("tokens/s", "tokens_per_s", "{:,.0f}", spread=True),
)
_SCALE = {"flops_per_token": 1e-6}

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
            values = [x * _SCALE.get(column.key, 1) for x in group.values(column.key)]
            row[column.key] = statistics.fmean(values)
            if column.spread and len(values) > 1:
                row[f"{column.key} sd"] = statistics.stdev(values)
        if kernel_ms is not None and group.mixer in kernel_ms:
            row["kernel_ms"] = kernel_ms[group.mixer]
        table.append(row)
    return table


def _headings(table: Sequence[Row]) -> list[Column]:
    kernel = Column("kernel ms", "kernel_ms", "{:.3f}")
    return [column for column in (*COLUMNS, kernel) if any(column.key in row for row in table)]


def _cell(row: Row, column: Column) -> str:
    if column.key not in row:
        return ""
    text = column.form.format(row[column.key])
    spread = row.get(f"{column.key} sd")
    return text if spread is None else f"{text} ± {column.form.format(spread)}"


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
