"""Any set of run directories -> a table, plots and a page in one directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.report.draw.page import Section, page
from lkda.report.draw.style import Picture
from lkda.report.draw.tables import markdown_table
from lkda.report.operators import benchmark as bench
from lkda.report.operators import report as bench_report
from lkda.report.read.files import read_results_file, write_atomically
from lkda.report.read.groups import Group, also_differing, group_runs
from lkda.report.read.runs import Run, as_record, from_record, read_runs, reported_split, tokenizers_differ
from lkda.report.training import accuracy, accuracy_plots, plots, table

RESULTS = "results.json"
KIND = "comparison"


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        skipped: what was left out, with the reasons.
        benchmark: of the operators; None for none.
        alone: whether each run had its device to itself.
    """

    title: str
    runs: list[Run]
    skipped: list[tuple[str, str]]
    benchmark: bench.Benchmark | None
    alone: bool = True

    @property
    def groups(self) -> list[Group]:
        """The rows of the table."""
        return group_runs(self.runs)

    @property
    def across_tokenizers(self) -> bool:
        """Whether only bits per byte compare."""
        return tokenizers_differ(self.runs) and not accuracy.has_parts(self.runs)

    @property
    def rows(self) -> list[table.Row]:
        """The table in full numbers."""
        kernel_ms = bench.kernel_times(self.benchmark.rows)[1] if self.benchmark else None
        across = self.across_tokenizers
        return table.rows(self.groups, across_tokenizers=across, alone=self.alone, kernel_ms=kernel_ms)

    @property
    def notes(self) -> list[str]:
        """Sentences on reading the table."""
        devices = sorted({str(run.summary.get("device", "an unnamed device")) for run in self.runs})
        notes = [f"{len(self.runs)} run{'s' if len(self.runs) > 1 else ''} on {'; '.join(devices)}."]
        tested = sum("test/loss" in run.summary for run in self.runs)
        if tested == len(self.runs):
            notes.append(
                "What says test is of the test split, measured once at the end; curves and bits at the same time are "
                "of validation."
            )
        elif tested:
            notes.append(f"{tested} of the runs have a test split: what does not say test is of validation.")
        steps = sorted({run.summary["at_step"] for run in self.runs if "at_step" in run.summary})
        if steps:
            planned = sorted({run.config["trainer"]["max_steps"] for run in self.runs})
            ended = sum(run.summary["status"] == "finished" for run in self.runs) or "none"
            notes.append(
                f"Read at the validation of step {' and '.join(map(str, steps))} of {' and '.join(map(str, planned))}; "
                f"{ended} of the runs finished."
            )
        if len(devices) > 1:
            notes.append("The devices differ: times and tokens/s do not compare.")
        if self.across_tokenizers:
            notes.append("Data or tokenizers differ: the runs compare in bits per byte; a loss per token does not.")
        differing = also_differing(self.runs)
        if differing:
            notes.append(f"Besides the mixer, these differ between the rows: {', '.join(differing)}.")
        if any(len(group.runs) > 1 for group in self.groups):
            notes.append("± is the standard deviation over seeds.")
        if not self.alone:
            notes.append("Runs shared a device: nothing of time is compared.")
        seconds = table.same_time(self.groups) if self.alone else None
        if seconds is not None:
            notes.append(
                f"Same time: after {seconds:.1f} s of training, when the first run ended, by a straight line between "
                "validations; of runs that had the device to themselves."
            )
        timed = bench.kernel_times(self.benchmark.rows)[0] if self.benchmark else ""
        if self.benchmark and timed:
            notes.append(f"kernel ms: the operator alone, {timed}, on {self.benchmark.device}.")
        return notes


def compare(
    directories: Sequence[Path],
    out: Path,
    *,
    title: str,
    benchmark: Path | None = None,
    step: int | None = None,
    alone: bool = True,
) -> Comparison:
    """Reads run directories and writes table.csv, table.md, results.json, plots and report.html into `out`.

    Args:
        directories: run directories; what is none is left out by name.
        benchmark: JSON of scripts/benchmark.py: adds a column and a section of the page.
        step: read every run at its validation of that step, finished or not; where None, as it ended.
        alone: whether each run had its device to itself; where not, nothing of time is compared.
    Raises:
        ValueError: none of them is a finished run, or `benchmark` is no benchmark.
        OSError: `out` cannot be written.
    """
    runs, skipped = read_runs(directories, step=step)
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:5])
        raise InputError(
            f"none of the {len(directories)} paths is the directory of a finished run ({reasons}); give those that "
            "hold a summary.json."
        )
    kernels = bench.read_benchmark(benchmark) if benchmark else None
    result = Comparison(title, runs, [(str(path), reason) for path, reason in skipped], kernels, alone)
    out.mkdir(parents=True, exist_ok=True)
    write(result, out / RESULTS)
    return result


def read_comparison(path: Path) -> Comparison:
    """The comparison in a file. Raises ValueError where it holds none."""
    found = read_results_file(path, kind=KIND)
    try:
        kernels = found["benchmark"] and bench.Benchmark(**found["benchmark"])
        runs = [from_record(record) for record in found["runs"]]
        return Comparison(
            found["title"], runs, [tuple(pair) for pair in found["skipped"]], kernels, found.get("alone", True)
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a comparison's ({error}); scripts/compare.py writes one.") from error


def redraw(path: Path) -> None:
    """Writes the comparison in a file, and all that is made of it, anew. Raises ValueError where it holds none."""
    write(read_comparison(path), path)


def write(comparison: Comparison, path: Path) -> None:
    """Writes a comparison to `path`, and its tables, plots and page beside it."""
    out, rows, notes = path.parent, comparison.rows, comparison.notes
    results: dict[str, Any] = {"kind": KIND, "title": comparison.title, "rows": rows, "notes": notes}
    results |= {"runs": [as_record(run) for run in comparison.runs], "skipped": comparison.skipped}
    results |= {"benchmark": comparison.benchmark and asdict(comparison.benchmark), "alone": comparison.alone}
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    head, body = table.as_cells(rows)
    write_atomically(out / "table.csv", table.as_csv(rows))
    write_atomically(out / "table.md", markdown_table(head, body) + "\n" + "".join(f"{n}\n" for n in notes))
    drawn = _pictures(comparison)
    for (name, _), picture in drawn.items():
        write_atomically(out / f"{name}.png", picture.light)
    sections = [Section(head=head, body=body, notes=notes)]
    if accuracy.has_parts(comparison.runs):
        by_part, best = accuracy.table(comparison.runs), "Accuracy of asked tokens, each model at its better rate"
        sections += [Section(best, *by_part, names=by_part[0].index("mixer") + 1)]
    sections += [Section(heading, pictures={heading: picture}) for (_, heading), picture in drawn.items()]
    sections += [bench_report.section(comparison.benchmark)] if comparison.benchmark else []
    left_out = [f"{path}: {reason}" for path, reason in comparison.skipped]
    sections += [Section("Left out", items=left_out)] if left_out else []
    write_atomically(out / "report.html", page(comparison.title, sections))


def _pictures(comparison: Comparison) -> dict[tuple[str, str], Picture]:
    """By file name and heading. Across tokenizers in bits per byte alone, else in nats with bits per byte beside; of
    synthetic tasks accuracies in their place."""
    if accuracy.has_parts(comparison.runs):
        lines = accuracy.lines(comparison.runs)
        drawn = {
            ("accuracy_by_state", "Accuracy against the size of the state"): accuracy_plots.by_state(lines),
            ("accuracy_by_length", "Accuracy against length"): accuracy_plots.by_length(lines),
        }
        return {name: picture for name, picture in drawn.items() if picture is not None}
    groups, across = comparison.groups, comparison.across_tokenizers
    texts = all(run.summary.get("val/bits_per_byte") is not None for run in comparison.runs)
    y, loss = ("val/bits_per_byte", "Bits per byte") if across and texts else ("val/loss", "Loss")
    scale = groups[0].mean("val/bits_per_byte") / groups[0].mean("val/loss") if texts and not across else None
    by_position = None if across else plots.loss_by_position(groups, bits_per_nat=scale)
    drawn = {
        ("loss_by_tokens", f"{loss} against tokens"): plots.loss_curves(groups, x="tokens", y=y, bits_per_nat=scale),
        ("loss_by_seconds", f"{loss} against time"): plots.loss_curves(groups, x="seconds", y=y, bits_per_nat=scale),
        ("loss_by_position", "Loss by position in the context"): by_position,
        ("loss_by_state", f"{loss} against the size of the state"): plots.loss_against_state(
            groups, y=y.replace("val/", f"{reported_split(comparison.runs)}/")
        ),
    }
    if not comparison.alone:
        drawn = {name: picture for name, picture in drawn.items() if name[0] != "loss_by_seconds"}
    return {name: picture for name, picture in drawn.items() if picture is not None}
