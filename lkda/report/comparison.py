"""Any set of run directories -> a table, plots and a page in one directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lkda.report import plots, table
from lkda.report.files import write_atomically
from lkda.report.page import page
from lkda.report.runs import group_runs, read_runs, tokenizers_differ


@dataclass(frozen=True)
class Comparison:
    """What was compared: the rows of the table, notes on reading it, and what was left out, with reasons."""

    rows: list[table.Row]
    notes: list[str]
    skipped: list[tuple[Path, str]]


def compare(
    directories: Sequence[Path], out: Path, *, title: str, kernel_ms: dict[str, float] | None = None
) -> Comparison:
    """Writes table.csv, table.md, results.json, three plots and report.html into `out`.

    Args:
        directories: run directories; what is none is left out by name.
        kernel_ms: an operator's forward+backward milliseconds by mixer, for the table.
    Raises: ValueError where none of them is a finished run.
    """
    runs, skipped = read_runs(directories)
    if not runs:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped[:5])
        raise ValueError(f"none of the {len(directories)} directories is a finished run ({reasons}).")
    groups = group_runs(runs)
    rows = table.rows(groups, kernel_ms)
    across = tokenizers_differ(runs)
    unit = "val/bits_per_byte" if across else "val/loss"
    notes = _notes(runs, across=across)
    pictures = {
        "loss_by_tokens": plots.loss_curves(groups, x="tokens", y=unit),
        "loss_by_seconds": plots.loss_curves(groups, x="seconds", y=unit),
        "loss_by_state": plots.loss_against_state(groups, y=unit),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        write_atomically(out / f"{name}.png", png)
    write_atomically(out / "table.csv", table.as_csv(rows))
    write_atomically(out / "table.md", table.as_markdown(rows) + "\n" + "".join(f"{note}\n" for note in notes))
    summaries = [run.summary | {"run": run.directory.name} for run in runs]
    results = {"title": title, "rows": rows, "notes": notes, "runs": summaries}
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    headings = ("Loss against tokens", "Loss against time", "Loss against the size of the state")
    left_out = [f"{path}: {reason}" for path, reason in skipped]
    content = page(title, rows, dict(zip(headings, pictures.values())), notes=notes, skipped=left_out)
    write_atomically(out / "report.html", content)
    return Comparison(rows, notes, skipped)


def _notes(runs: list, *, across: bool) -> list[str]:
    devices = sorted({str(run.summary.get("device", "unknown device")) for run in runs})
    notes = [f"{len(runs)} run{'s' if len(runs) > 1 else ''} on {', '.join(devices)}."]
    if across:
        notes.append("The runs differ in data or tokenizer: compare bits per byte, not loss or perplexity.")
    if any(run.summary.get("seed") != runs[0].summary.get("seed") for run in runs):
        notes.append("± is the standard deviation over seeds.")
    return notes
