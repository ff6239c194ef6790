"""Draws notes.json of `scripts/benchmark.py task=notes`: the table of the notes that the project began with, measured.

The JSON is {"kind": "notes", "header": {device, torch, versions, copy_gb_per_s, product_tflops, multiprocessors, date},
"rows": [...]}. A row has the part that it belongs to ("length", "head size" or "ablation"), its name, op, B, T, H, D,
the times and the resources; see `lkda.bench.notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.style import LINES, MARKERS, Picture, Style, occurrence_index, picture
from lkda.report.draw.tables import markdown_table
from lkda.report.draw.units import count, length, memory, three
from lkda.report.read.files import read_results_file
from lkda.report.studies.notes_claims import claims, decoding_beside, exponent, part_of

KIND = "notes"
# The first columns of each table are text.
NAMES = {"times": 1, "rows": 2, "heads": 1, "simplified": 1, "recurrent": 1, "claims": 4}
TITLES = {
    "times": "Milliseconds by length",
    "rows": "Every row",
    "heads": "Milliseconds by head size",
    "simplified": "The lessons on a kernel of simplified linear attention",
    "recurrent": "Registers and occupancy on KDA's recurrent kernel",
    "claims": "Claims",
}
Row = dict[str, Any]
Cells = tuple[list[str], list[list[str]]]


def tables(found: dict[str, Any], decoding: Sequence[Row]) -> dict[str, Cells]:
    """Each table as headings and cells, by its name in TITLES.

    Args:
        decoding: rows of `scripts/benchmark.py task=decode` on the same device; the claim on throughput is about them.
    """
    rows = found["rows"]
    return {
        "times": _times(rows),
        "rows": _rows(rows),
        "heads": _heads(rows),
        "simplified": _ablations(rows, "simplified"),
        "recurrent": _ablations(rows, "kda"),
        "claims": claims(rows, decoding),
    }


def note(found: dict[str, Any]) -> str:
    """The device, its speeds, what was measured, and the date, in words."""
    header = found["header"]
    return (
        f"{header['device']}, copies at {header['copy_gb_per_s']:,.0f} GB/s, bf16 matrix products at "
        f"{header['product_tflops']:,.0f} TFLOP/s, torch {header['torch']}; forward, bf16, replayed CUDA graphs; "
        f"{header['date'][:10]}."
    )


def shape_of(found: dict[str, Any], name: str) -> str:
    """The batch and the heads of a table that does not have them in its rows, in words; else empty."""
    rows = {"times": part_of(found["rows"], "length"), "heads": part_of(found["rows"], "head size")}.get(name)
    if not rows:
        return ""
    B, T, H, D = (rows[0][axis] for axis in "BTHD")
    sequences = f"{B} sequence{'s' if B > 1 else ''}"
    return f"{sequences}, {H} heads of {D}." if name == "times" else f"{sequences} of {length(T)} tokens, {H} heads."


def block(name: str, path: Path) -> str:
    """A table of notes.json for a page, with a note."""
    found = read_results_file(path, kind=KIND)
    return markdown_table(*tables(found, decoding_beside(path, found))[name], names=NAMES[name]) + "\n" + note(found)


def redraw(path: Path) -> None:
    """Writes table.md and time_by_length.png beside a results file.

    Raises: ValueError where it is not of scripts/benchmark.py task=notes.
    """
    found = read_results_file(path, kind=KIND)
    try:
        parts = tables(found, decoding_beside(path, found))
        text = "\n".join(
            f"{TITLES[name]}:\n\n{markdown_table(*cells, names=NAMES[name])}" for name, cells in parts.items()
        )
        drawn = _plot(found["rows"])
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not of scripts/benchmark.py task=notes ({error!r}).") from error
    write_together(
        {path.parent / "table.md": f"{text}\n{note(found)}\n", path.parent / "time_by_length.png": drawn.light}
    )


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


def _line(rows: Sequence[Row], name: str, axis: str, key: str) -> list[tuple[float, float | None]]:
    """The values of an implementation along an axis; None where it was not measured."""
    found = {row[axis]: row[key] for row in rows if row["name"] == name}
    return [(x, found.get(x)) for x in sorted({row[axis] for row in rows})]


def _times(rows: Sequence[Row]) -> Cells:
    """Milliseconds of each implementation at each length, the exponent of T, and the resources."""
    table = part_of(rows, "length")
    head = ["operator", *(f"ms at {length(T)}" for T in sorted({row["T"] for row in table}))]
    head += ["exponent of T", "exponent of the last two", "complexity", "registers", "shared KiB"]
    body = []
    for name in _names(table):
        line = _line(table, name, "T", "ms_median")
        largest = max((row for row in table if row["name"] == name), key=lambda row: row["T"])
        body.append(
            [
                name,
                *(_ms(ms) for _, ms in line),
                _fit(line),
                _fit(line[-2:]),
                largest["complexity"],
                *_resources(largest),
            ]
        )
    return head, body


def _heads(rows: Sequence[Row]) -> Cells:
    """Milliseconds at each head size, and the exponent of D of the times and of the operations."""
    table = part_of(rows, "head size")
    head = ["operator", *(f"ms at D = {D}" for D in sorted({row["D"] for row in table}))]
    body = []
    for name in _names(table):
        line, operations = (_line(table, name, "D", key) for key in ("ms_median", "operations"))
        body.append([name, *(_ms(ms) for _, ms in line), _fit(line), _fit(operations)])
    return [*head, "exponent of D", "exponent of D of the operations"], body


def _rows(rows: Sequence[Row]) -> Cells:
    head = ["operator", "B x T x H x D", "ms", "operations", "bytes", "bound by", "x lower bound", "GB/s", "TFLOP/s"]
    head += ["relative error", "registers", "shared KiB", "state per sequence", "peak MiB"]
    body = []
    for row in [*part_of(rows, "length"), *part_of(rows, "head size")]:
        tflops = row["operations"] / row["ms_median"] / 1e9
        cells = [row["name"], _shape(row), _ms(row["ms_median"]) + " (noisy)" * bool(row["noisy"])]
        cells += [count(row["operations"]), memory(row["bytes"]), row["bound_by"]]
        cells += [three(1 / row["fraction_of_lower_bound"]), three(row["gb_per_s"]), three(tflops)]
        cells += ["" if row["error"] is None else f"{row['error']:.1e}", *_resources(row)]
        body.append([*cells, memory(row["state_bytes"]), f"{row['peak_mib']:,.0f}"])
    return head, body


def _ablations(rows: Sequence[Row], op: str) -> Cells:
    """A line for each variant, with its time at each shape, also as a multiple of the first variant's."""
    table = [row for row in part_of(rows, "ablation") if row["op"] == op]
    shapes = list(dict.fromkeys(map(_shape, table)))
    head = ["variant"]
    for shape in shapes:
        head += [f"ms, {shape}", "time / first variant's", "occupancy"]
    head += ["registers", "spilled bytes", "shared KiB", "possible occupancy", "relative error"]
    first = {_shape(row): row["ms_median"] for row in reversed(table)}
    body = []
    for name in _names(table):
        variant = {_shape(row): row for row in table if row["name"] == name}
        cells = [name]
        for shape in shapes:
            row = variant.get(shape)
            cells += _timed(row, first[shape]) if row else ["", "", ""]
        row = next(iter(variant.values()))
        cells += [str(row["registers"]), str(row["spill_bytes"]), f"{row['shared_bytes'] / 1024:.1f}"]
        error = max(row["error"] for row in variant.values())
        body.append([*cells, f"{row['occupancy_limit']:.0%}", f"{error:.1e}"])
    return head, body


def _timed(row: Row, first: float) -> list[str]:
    return [_ms(row["ms_median"]), f"{row['ms_median'] / first:.2f}", f"{row['occupancy']:.0%}"]


def _shape(row: Row) -> str:
    return "x".join(str(row[axis]) for axis in "BTHD")


def _resources(row: Row) -> list[str]:
    """Registers and shared KiB; empty for a kernel of another library."""
    if row.get("registers") is None:
        return ["", ""]
    return [str(row["registers"]), f"{row['shared_bytes'] / 1024:.1f}"]


def _ms(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}" if x < 0.1 else three(x)


def _fit(line: Sequence[tuple[float, float | None]]) -> str:
    found = exponent(line)
    return "" if found is None else f"{found:.2f}"


def _plot(rows: Sequence[Row]) -> Picture:
    """Time against length, a line for each implementation, on logarithmic axes."""
    table = part_of(rows, "length")
    names, lengths = _names(table), sorted({row["T"] for row in table})

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axis = figure.subplots()
        mixers = [name.split(",")[0].lower() for name in names]
        colours = style.colours(mixers)
        for name, mixer, n in zip(names, mixers, occurrence_index(mixers), strict=True):
            points = [(row["T"], row["ms_median"]) for row in table if row["name"] == name]
            axis.plot(*zip(*points), LINES[n], color=colours[mixer], marker=MARKERS[n], markersize=4.5, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set(major_locator=FixedLocator(lengths), minor_locator=NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length(value)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: three(value) if value >= 1e-3 else f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("tokens of the sequence")
        axis.set_ylabel("milliseconds of a forward pass")
        if table:
            first = table[0]
            axis.set_title(f"{first['B']} sequence, {first['H']} heads of {first['D']}, bf16", fontsize=10, loc="left")
        figure.legend(loc="outside right center", fontsize=9, frameon=False)
        return figure

    return picture(draw)
