"""Any set of run directories -> a table, plots and a page in one directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lkda.report import bench, bench_report, plots, table
from lkda.report.files import write_atomically
from lkda.report.groups import Group, also_differing, group_runs
from lkda.report.page import Section, page
from lkda.report.runs import Run, read_runs, tokenizers_differ
from lkda.report.theme import Picture


@dataclass(frozen=True)
class Comparison:
    """What was compared: the rows of the table, notes on reading it, and what was left out, with reasons."""

    rows: list[table.Row]
    notes: list[str]
    skipped: list[tuple[Path, str]]


def compare(directories: Sequence[Path], out: Path, *, title: str, benchmark: Path | None = None) -> Comparison:
    """Writes table.csv, table.md, results.json, three plots and report.html into `out`.

    Args:
        directories: run directories; what is none is left out by name.
        benchmark: JSON of scripts/benchmark.py: adds a column and a section of the page.
    Raises:
        ValueError: none of them is a finished run, or `benchmark` is no benchmark.
        OSError: `out` cannot be written.
    """
    runs, skipped = read_runs(directories)
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:5])
        raise ValueError(
            f"none of the {len(directories)} paths is the directory of a finished run ({reasons}); give those that "
            "hold a summary.json."
        )
    kernels = bench.read_benchmark(benchmark) if benchmark else None
    timed, kernel_ms = bench.kernel_times(kernels.rows) if kernels else ("", {})
    groups = group_runs(runs)
    across = tokenizers_differ(runs)
    rows = table.rows(groups, across_tokenizers=across, kernel_ms=kernel_ms)
    notes = _notes(runs, groups, across=across)
    if kernels and kernel_ms:
        notes.append(f"kernel ms: the operator alone, {timed}, on {kernels.device}.")
    out.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(groups, across=across)
    for name, picture in pictures.items():
        write_atomically(out / f"{name}.png", picture.light)
    head, body = table.as_cells(rows)
    write_atomically(out / "table.csv", table.as_csv(rows))
    write_atomically(out / "table.md", table.markdown_table(head, body) + "\n" + "".join(f"{n}\n" for n in notes))
    summaries = [run.summary | {"run": run.directory.name} for run in runs]
    results = {"title": title, "rows": rows, "notes": notes, "runs": summaries}
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    loss = "Bits per byte" if across else "Loss"
    headings = (f"{loss} against tokens", f"{loss} against time", f"{loss} against the size of the state")
    sections = [Section(head=head, body=body, notes=notes)]
    sections += [Section(name, pictures={name: picture}) for name, picture in zip(headings, pictures.values())]
    sections += [bench_report.section(kernels)] if kernels else []
    left_out = [f"{path}: {reason}" for path, reason in skipped]
    sections += [Section("Left out", items=left_out)] if left_out else []
    write_atomically(out / "report.html", page(title, sections))
    return Comparison(rows, notes, skipped)


def _pictures(groups: Sequence[Group], *, across: bool) -> dict[str, Picture]:
    """By file name. Across tokenizers in bits per byte alone, else in nats with bits per byte at the right."""
    y = "val/bits_per_byte" if across else "val/loss"
    scale = None if across else groups[0].mean("val/bits_per_byte") / groups[0].mean("val/loss")
    return {
        "loss_by_tokens": plots.loss_curves(groups, x="tokens", y=y, bits_per_nat=scale),
        "loss_by_seconds": plots.loss_curves(groups, x="seconds", y=y, bits_per_nat=scale),
        "loss_by_state": plots.loss_against_state(groups, y=y),
    }


def _notes(runs: Sequence[Run], groups: Sequence[Group], *, across: bool) -> list[str]:
    def distinct(key: str) -> list[str]:
        return sorted({str(run.summary.get(key, "unknown")) for run in runs})

    devices = distinct("device")
    notes = [f"{len(runs)} run{'s' if len(runs) > 1 else ''} on {'; '.join(devices)}."]
    if len(devices) > 1:
        notes.append("The devices differ: times and tokens/s do not compare.")
    if across:
        notes.append(
            "The runs differ in data or tokenizer: they compare in bits per byte, and a loss per token does not."
        )
    differing = also_differing(runs)
    if differing:
        notes.append(f"Besides the mixer, these differ between the rows: {', '.join(differing)}.")
    if any(len(group.runs) > 1 for group in groups):
        notes.append("± is the standard deviation over seeds.")
    return notes
