"""Draws decode.json of `scripts/benchmark.py task=decode`: a table, and plots by context and batch.

The JSON is {"kind": "decode", "header": {device, torch, lkda, versions, git_commit, date}, "rows": [...]}. A row holds
the case (`lkda.commands.benchmarks.decode_case`) and the measurements of `lkda.bench.decode`; or the reason why nothing
was measured, with the bytes needed where the states do not fit into the memory.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.style import Look, Picture, Style, picture
from lkda.report.draw.tables import markdown_table
from lkda.report.draw.units import count, length, memory
from lkda.report.read.crossings import crossings as points_in_common
from lkda.report.read.files import read_results_file

KIND = "decode"
NAMES = 2  # the first columns of the table are names
LKDA, PREFILL = "lkda", "prefill"  # implementations; any other is a peer
MOST_PANELS = 4  # of a plot; the first and the last are among them
Row = dict[str, Any]
Points = list[tuple[float, float]]


def as_cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the cells as text. Columns that would be empty are left out; a row without a measurement has the
    bytes that its states need, and the reason as its last cell."""

    def of_tokens(value: Callable[[Row], float]) -> Callable[[Row], float | None]:
        """The value of rows that decode."""
        return lambda row: value(row) if row["implementation"] != PREFILL and row.get("tokens_per_s") else None

    def prefill(row: Row) -> float | None:
        """The speed of prefill: in its own row, and beside the decoding of the same model and context."""
        if row["implementation"] not in (LKDA, PREFILL):
            return None
        same = [other for other in rows if other["implementation"] == PREFILL and _subject(other) == _subject(row)]
        return next((other.get("tokens_per_s") for other in same if other["context"] == row["context"]), None)

    columns: list[tuple[str, Callable[[Row], float | None], Callable[[float], str]]] = [
        ("tokens/s", of_tokens(lambda row: row["tokens_per_s"]), "{:,.0f}".format),
        ("per sequence", of_tokens(lambda row: row["tokens_per_s"] / row["batch"]), "{:,.1f}".format),
        ("ms per step", of_tokens(lambda row: 1000 * row["batch"] / row["tokens_per_s"]), "{:.3f}".format),
        ("of copy bandwidth", lambda row: row.get("copy_share"), "{:.0%}".format),
        ("lkda / this", _ratio, "{:,.2f}".format),
        ("memory per sequence", lambda row: row.get("bytes_per_sequence"), memory),
        ("memory needed", lambda row: row.get("bytes_needed"), memory),
        ("prefill tokens/s", prefill, "{:,.0f}".format),
        ("prefill / forward", _prefill_ratio, "{:.2f}".format),
    ]
    shown = [column for column in columns if any(column[1](row) is not None for row in rows)]
    notes = [_remark(row) for row in rows]
    head = ["model", "what", "weights", "batch", "context", *(heading for heading, _, _ in shown)]
    body = []
    for row, remark in zip(rows, notes, strict=True):
        cells = [row["model"], row["title"], row["dtype"], f"{row['batch']:,}", length(row["context"])]
        for _, value, form in shown:
            found = value(row)
            cells.append("" if found is None else form(found))
        body.append([*cells, remark] if any(notes) else cells)
    return [*head, "remark"] if any(notes) else head, body


def _subject(row: Row) -> tuple[str, str, str]:
    return str(row["model"]), str(row["mixer"]), str(row["dtype"])


def _ratio(row: Row) -> float | None:
    """lkda's tokens/s over those of a peer, in the same process."""
    both = row.get("lkda_tokens_per_s") and row.get("tokens_per_s")
    return row["lkda_tokens_per_s"] / row["tokens_per_s"] if both else None


def _prefill_ratio(row: Row) -> float | None:
    """tokens/s of prefill over those of the forward without head."""
    return row["tokens_per_s"] / row["forward_tokens_per_s"] if row.get("forward_tokens_per_s") else None


def _remark(row: Row) -> str:
    if "not_captured" in row:
        return f"without CUDA graphs: {row['not_captured']}"[:80]
    return str(row.get("reason", ""))[:80]


def crossings(rows: Sequence[Row]) -> list[tuple[str, str, float, float]]:
    """Where a mixer passes softmax: (panel, title, context, tokens/s).

    Between two measured contexts both speeds are straight lines in the logarithms. A mixer that is faster at the
    shortest context that both have, or is still slower at the longest, has no crossing.
    """
    found = []
    for panel, lines in _panels(rows, by="batch", along="context", value="tokens_per_s").items():
        softmax = lines.get("softmax", [])
        for title, line in lines.items():
            found += [(panel, title, x, y) for x, y, above in points_in_common(line, softmax) if above]
    return found


def note(found: dict[str, Any]) -> str:
    """The device, what the columns mean, the crossings with softmax, and the versions, in words."""
    header, first = found["header"], found["rows"][0]
    top_p = next((row["top_p"] for row in found["rows"] if row["implementation"] == LKDA), None)
    copied = [row["copy_gb_per_s"] for row in found["rows"] if "copy_gb_per_s" in row]
    copies = f", copies at {sorted(copied)[len(copied) // 2]:,.0f} GB/s" if copied else ""
    passed = "".join(
        f" {title} passes softmax at a context of {length(round(x))} ({panel})."
        for panel, title, x, _ in crossings(found["rows"])
    )
    overrides = f", overrides {' '.join(first['overrides'])}" if first["overrides"] else ""
    installed = [f"{name} {version}" for name, version in header.get("versions", {}).items() if version]
    return (
        f"{header['device']}{copies}; {'greedy' if top_p is None else f'top_p {top_p}'}, vocabulary "
        f"{first['vocab_size']:,}{overrides}; {', '.join(installed) or 'torch ' + header['torch']}; "
        f"{header.get('date', '')[:10]}.{passed}"
    )


def redraw(path: Path) -> None:
    """Writes table.md, the same as table.json, and the plots that the rows allow beside a results file.

    Raises: ValueError where it is not of scripts/benchmark.py task=decode.
    """
    found = read_results_file(path, kind=KIND)
    try:
        rows = found["rows"]
        head, body = as_cells(rows)
        table = {"kind": "table", "rows": [dict(zip(head, cells)) for cells in body], "note": note(found)}
        files: dict[Path, str | bytes] = {
            path.parent / "table.md": f"{markdown_table(head, body, names=NAMES)}\n{note(found)}\n",
            path.parent / "table.json": json.dumps(table, indent=1) + "\n",  # lkda.report.readme writes it into a page
        }
        for name, drawn in _pictures(rows).items():
            files[path.parent / name] = drawn.light
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not of scripts/benchmark.py task=decode ({error!r}).") from error
    write_together(files)


def _pictures(rows: Sequence[Row]) -> dict[str, Picture]:
    by_context = _panels(rows, by="batch", along="context", value="tokens_per_s")
    by_batch = _panels(rows, by="context", along="batch", value="tokens_per_s")
    bytes_by_context = _panels(rows, by=None, along="context", value="bytes_per_sequence")
    found = {}
    if by_context:
        found["tokens_per_s_by_context.png"] = _plot(
            by_context, "context, tokens", "tokens/s", length, count, crossings(rows)
        )
    if by_batch:
        found["tokens_per_s_by_batch.png"] = _plot(
            by_batch, "batch, sequences", "tokens/s", "{:,.0f}".format, count, []
        )
    if bytes_by_context:
        y_title = "memory of the state of one sequence"
        found["memory_by_context.png"] = _plot(bytes_by_context, "context, tokens", y_title, length, memory, [])
    return found


Panels = dict[str, dict[str, Points]]


def _panels(rows: Sequence[Row], *, by: str | None, along: str, value: str) -> Panels:
    """The lines to draw: for each model, dtype of the weights and value of `by`, the points (along, value) of each
    title. A panel has a line of two points at least, and there are at most MOST_PANELS."""
    found: Panels = {}
    for row in rows:
        if row["implementation"] == PREFILL or not row.get(value):
            continue
        shown = {None: "", "batch": f", batch {row['batch']:,}", "context": f", context {length(row['context'])}"}[by]
        line = found.setdefault(f"{row['model']}, {row['dtype']}{shown}", {}).setdefault(str(row["title"]), [])
        if row[along] not in [x for x, _ in line]:
            line.append((row[along], row[value]))
    sorted_panels = {panel: {title: sorted(line) for title, line in lines.items()} for panel, lines in found.items()}
    panels = [panel for panel, lines in sorted_panels.items() if max(map(len, lines.values())) > 1]
    if len(panels) > MOST_PANELS:
        places = [round(n * (len(panels) - 1) / (MOST_PANELS - 1)) for n in range(MOST_PANELS)]
        panels = [panels[place] for place in places]
    return {panel: sorted_panels[panel] for panel in panels}


def _plot(
    panels: Panels,
    x_title: str,
    y_title: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    marks: Sequence[tuple[str, str, float, float]],
) -> Picture:
    """A panel for each model and size, a line for each mixer or peer, on logarithmic axes.

    Args:
        marks: the crossings; a ring marks each, and the title of the panel names it.
    """
    titles = list(dict.fromkeys(title for lines in panels.values() for title in lines))

    def draw(style: Style) -> Figure:
        across = min(2, len(panels))
        down = -(-len(panels) // across)
        legend = 0.2 * -(-len(titles) // 2)
        figure = Figure(figsize=(1.2 + 4.2 * across, 0.4 + legend + 3.3 * down), layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharey=True)
        looks = dict(zip(titles, style.looks([title.split(",")[0] for title in titles], titles), strict=True))
        for axis, (panel, lines) in zip(axes.flat, panels.items()):
            _draw_panel(axis, lines, looks)
            here = [mark for mark in marks if mark[0] == panel]
            for _, title, x, y in here:
                axis.plot([x], [y], "o", markersize=10, markerfacecolor="none", color=looks[title].colour, zorder=3)
            axis.set_title(_panel_title(panel, here), fontsize=9.5, loc="left")
            xs = sorted({x for line in lines.values() for x, _ in line})
            axis.xaxis.set(major_locator=FixedLocator(xs), minor_locator=NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_text(value)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: y_text(value)))
            axis.yaxis.set_minor_formatter(NullFormatter())
            if y_text is memory:
                axis.yaxis.set_major_locator(LogLocator(base=4))
            else:
                axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        for axis in list(axes.flat)[max(0, len(panels) - across) : len(panels)]:
            axis.set_xlabel(x_title)
        figure.supylabel(y_title, fontsize=10)
        handles = {line.get_label(): line for axis in axes.flat for line in axis.lines if line.get_label() in looks}
        figure.legend(
            [handles[title] for title in titles], titles, loc="outside lower center", ncols=2, fontsize=9, frameon=False
        )
        return figure

    return picture(draw)


def _panel_title(panel: str, marks: Sequence[tuple[str, str, float, float]]) -> str:
    if not marks:
        return panel
    named = "; ".join(f"{title}, {length(round(x))}" for _, title, x, _ in marks)
    return f"{panel}\n" + textwrap.fill(f"faster than softmax from a context of: {named}", 62)


def _draw_panel(axis: Any, lines: dict[str, Points], looks: dict[str, Look]) -> None:
    for title, line in lines.items():
        look = looks[title]
        xs, ys = zip(*line)
        axis.plot(xs, ys, look.line, color=look.colour, marker=look.marker, markersize=4.5, linewidth=1.6, label=title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
