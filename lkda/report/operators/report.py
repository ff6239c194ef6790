"""Writes the tables, plots and page of a benchmark into one directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lkda.io import write_together
from lkda.report.draw.page import Section, page
from lkda.report.draw.style import Picture
from lkda.report.operators import plots as bench_plots
from lkda.report.operators import time_grid
from lkda.report.operators.benchmark import Benchmark, as_cells, as_csv, as_markdown, names_of, read_benchmark

COLUMNS = (
    "B x T x H x D: sequences, tokens, heads, and channels of a head. gate: how fast the state fades in these inputs. "
    "graph ms: the replay of a CUDA graph, which is the time of the device alone. eager ms: a call with the time that "
    "the host needs to launch the kernels. p20-p80 ms: the percentiles. x lower bound: the time divided by the least "
    "that the device allows. error: the largest relative error of the outputs and the gradients against float64. "
    "launches, host us: kernels, and microseconds of the host, for a call. shared KiB: shared memory of a block."
)


def table_section(benchmark: Benchmark) -> Section:
    """The table of the benchmark as a section of a page."""
    head, body = as_cells(benchmark.rows)
    hints = [COLUMNS] if body else []
    return Section("Operators", hints=hints, head=head, body=body, names=names_of(head), notes=[metadata(benchmark)])


def metadata(benchmark: Benchmark) -> str:
    """The device, the speed of its copies, versions and date, in words."""
    header = benchmark.header
    copy = header.get("copy_gb_per_s")
    parts = [benchmark.device, "" if copy is None else f"copies at {copy:,.0f} GB/s"]
    parts += [f"{name} {header[name]}" for name in ("torch", "lkda") if header.get(name)]
    return ", ".join(filter(None, [*parts, str(header.get("date") or "")])) + "."


def pictures(benchmark: Benchmark) -> dict[str, Picture]:
    """Plots by what they show: the times in each mode, and by length where there are several."""
    drawn = {}
    for mode in ("fwd", "fwd+bwd"):
        pages = time_grid.pages(benchmark.rows, mode=mode)
        for n, cells in enumerate(pages, 1):
            drawn[f"time of {mode}" + (f" {n}" if len(pages) > 1 else "")] = time_grid.times(cells, mode=mode)
        if bench_plots.by_length(benchmark.rows, mode=mode):
            drawn[f"time per token by length of {mode}"] = bench_plots.time_per_token_by_length(
                benchmark.rows, mode=mode
            )
        if bench_plots.over_simplified(benchmark.rows, mode=mode):
            drawn[f"kda over simplified of {mode}"] = bench_plots.ratio_by_length(benchmark.rows, mode=mode)
    return drawn


def redraw(path: Path) -> None:
    """Writes what `write` does beside a benchmark's file. Raises: ValueError where it is not one."""
    write(read_benchmark(path), path.parent)


def write(benchmark: Benchmark, out: Path) -> None:
    """Writes table.md, benchmark.csv, the plots and report.html into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    shown = replace(table_section(benchmark), heading="", pictures=pictures(benchmark))
    files: dict[Path, str | bytes] = {
        out / "table.md": as_markdown(benchmark.rows),
        out / "benchmark.csv": as_csv(benchmark.rows),
    }
    for name, picture in shown.pictures.items():
        files[out / f"{name.replace(' of ', '_').replace(' ', '_').replace('+', '_')}.png"] = picture.light
    files[out / "report.html"] = page("Operators side by side", [shown])
    write_together(files)
