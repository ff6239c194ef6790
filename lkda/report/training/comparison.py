"""Compares any set of run directories: writes a table, plots and a page into one directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lkda.checks import InputError
from lkda.io import write_together
from lkda.report.draw.page import Section, page
from lkda.report.draw.style import Picture
from lkda.report.draw.tables import markdown_table
from lkda.report.operators import benchmark as bench
from lkda.report.operators import report as bench_report
from lkda.report.read.files import read_results_file
from lkda.report.read.groups import NULL, Group, also_differing, group_runs, settings
from lkda.report.read.runs import (
    NO_VALIDATION,
    Run,
    as_record,
    from_record,
    read_runs,
    reported_split,
    tokenizers_differ,
)
from lkda.report.tradeoff.measurements import Results, damaged_files, find_results, measurements
from lkda.report.tradeoff.records import (
    COMMAND,
    Quality,
    best_of,
    by_data,
    by_quality,
    quality_of,
    reproduce,
    ties,
    within_spread,
)
from lkda.report.tradeoff.repeat import how_to_repeat
from lkda.report.tradeoff.report import Tradeoff, benchmark_of, notes_sections, remove_stale
from lkda.report.tradeoff.speed_plot import accuracy_by_speed
from lkda.report.training import accuracy, accuracy_plots, plots, table
from lkda.report.training.notes import notes as table_notes

RESULTS = "results.json"
Cell = TypeVar("Cell")
KIND = "comparison"
MOST_DIFFERING = 3  # settings that have a column in the table of runs
PLOTS = (
    *("loss_by_tokens", "loss_by_seconds", "loss_by_position", "loss_by_state", "loss_by_model"),
    *("accuracy_by_speed", "accuracy_by_state", "accuracy_by_length"),
)
# Plots whose place on the page is taken by interactive charts; the files are written.
AS_CHARTS = ("loss_by_tokens", "loss_by_seconds", "loss_by_state", "accuracy_by_speed", "accuracy_by_state")


@dataclass(frozen=True)
class Comparison:
    """The runs to compare.

    Attributes:
        skipped: run directories, and files of the benchmarks, that were left out, with the reasons.
        results: of scripts/benchmark.py.
        exclusive_device: whether no run shared its device with another process.
    """

    title: str
    runs: list[Run]
    skipped: list[tuple[str, str]]
    results: list[Results]
    exclusive_device: bool = True

    @property
    def benchmark(self) -> bench.Benchmark | None:
        """The operators' times, or None."""
        return benchmark_of(self.results)

    @property
    def tradeoff(self) -> Tradeoff:
        """The runs joined with the benchmarks."""
        recall = accuracy.records(accuracy.lines(self.runs_of_tasks))
        repeat = how_to_repeat(
            [run.summary.get("git_commit") for run in self.runs],
            [result.header.get("git_commit") for result in self.results],
        )
        return Tradeoff(self.groups, measurements(self.results), recall, self.exclusive_device, repeat)

    @property
    def groups(self) -> list[Group]:
        """The groups of runs; each is a row of the table."""
        return group_runs(self.runs)

    @property
    def runs_of_tasks(self) -> list[Run]:
        """The runs of synthetic tasks."""
        return [run for run in self.runs if accuracy.has_val_subsets(run)]

    @property
    def across_tokenizers(self) -> bool:
        """Whether only bits per byte can be compared, because data or tokenizers of runs of text differ."""
        return tokenizers_differ(run for run in self.runs if not accuracy.has_val_subsets(run))

    @property
    def rows(self) -> list[table.Row]:
        """The table with full-precision numbers."""
        kernel_ms = bench.kernel_times(self.benchmark.rows)[1] if self.benchmark else None
        across = self.across_tokenizers
        return table.rows(
            self.groups, across_tokenizers=across, exclusive_device=self.exclusive_device, kernel_ms=kernel_ms
        )

    def tables(self) -> dict[str, Section]:
        """The tables of the page: which_mixer, runs, and where there are benchmarks crossings and measurements."""
        tradeoff = self.tradeoff
        found = {"which_mixer": tradeoff.first_section(), "runs": _runs_section(self, self.rows, self.notes)}
        return found | dict(zip(("crossings", "measurements"), tradeoff.sections()))

    @property
    def notes(self) -> list[str]:
        """Sentences that explain the table."""
        return table_notes(
            self.runs,
            self.groups,
            across_tokenizers=self.across_tokenizers,
            exclusive_device=self.exclusive_device,
            benchmark=self.benchmark,
        )


def compare(
    directories: Sequence[Path],
    out: Path,
    *,
    title: str,
    benchmarks: Sequence[Path] = (),
    step: int | None = None,
    exclusive_device: bool = True,
    train_again: Callable[[dict[str, Any]], str] | None = None,
) -> Comparison:
    """Reads run directories and writes table.csv, table.md, results.json, plots and report.html into `out`.

    Args:
        directories: run directories. Others are left out and named.
        benchmarks: results of scripts/benchmark.py: files, or directories that hold some. They add the speeds.
        step: read every run as it was at the validation of that step, finished or not; at its end where None.
        exclusive_device: whether no run shared its device with another process. Else times are not compared.
        train_again: the command that repeats a run, from its configuration. Without it, the command names only the
            settings that tell the rows apart.
    Raises:
        ValueError: none of them is a finished run, or a path of `benchmarks` holds no benchmark.
        OSError: `out` cannot be written.
    """
    runs, skipped = read_runs(directories, step=step)
    if not runs:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in skipped[:5])
        if any(reason.startswith(NO_VALIDATION) for _, reason in skipped):
            there = reasons.replace(f"{NO_VALIDATION} {step}; ", "")
            raise InputError(
                f"none of the runs has a validation at step {step} ({there}); "
                "give a step at which all of them have one, or leave step out for finished runs at their end."
            )
        above = [f", as in runs='{path}/*'" for path in directories if any(path.glob("*/summary.json"))]
        raise InputError(
            f"no finished run in the paths of runs ({reasons}); give the directories that hold a summary.json"
            f"{''.join(above[:1])}."
        )
    if train_again is not None:
        runs = [replace(run, summary=run.summary | {COMMAND: train_again(run.config)}) for run in runs]
    results = find_results(benchmarks)
    left_out = [(str(path), reason) for path, reason in [*skipped, *damaged_files(benchmarks)]]
    result = Comparison(title, runs, left_out, results, exclusive_device)
    out.mkdir(parents=True, exist_ok=True)
    write(result, out / RESULTS)
    return result


def read_comparison(path: Path) -> Comparison:
    """Reads the comparison in a file. Raises ValueError where it holds none."""
    found = read_results_file(path, kind=KIND)
    try:
        results = [Results(**result) for result in found["benchmarks"]]
        runs = [from_record(record) for record in found["runs"]]
        return Comparison(
            found["title"],
            runs,
            [tuple(pair) for pair in found["skipped"]],
            results,
            found.get("exclusive_device", True),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a comparison ({error}); scripts/compare.py writes one.") from error


def redraw(path: Path) -> None:
    """Writes the comparison in a file again, with its tables, plots and page. Raises ValueError where it holds none."""
    write(read_comparison(path), path)


def write(comparison: Comparison, path: Path) -> None:
    """Writes a comparison to `path`, and its tables, plots and page beside it."""
    out, rows, notes = path.parent, comparison.rows, comparison.notes
    results: dict[str, Any] = {"kind": KIND, "title": comparison.title, "rows": rows, "notes": notes}
    results |= {"runs": [as_record(run) for run in comparison.runs], "skipped": comparison.skipped}
    results |= {
        "benchmarks": [asdict(result) for result in comparison.results],
        "exclusive_device": comparison.exclusive_device,
    }
    head, body = table.as_cells(rows)
    files: dict[Path, str | bytes] = {
        path: json.dumps(results, indent=1) + "\n",
        out / "table.csv": table.as_csv(rows),
        out / "table.md": markdown_table(head, body) + "\n" + "".join(f"{n}\n" for n in notes),
    }
    tradeoff = comparison.tradeoff
    markdown = markdown_table(head, body)
    drawn = _pictures(comparison)
    files |= {out / f"{name}.png": picture.light for (name, _), picture in drawn.items()}
    pictures = {heading: f"{name}.png" for (name, heading) in drawn if name not in AS_CHARTS}
    beside = tradeoff.files(comparison.title, table=markdown, notes=notes, pictures=pictures)
    files |= {out / name: content for name, content in beside.items()}
    tables = comparison.tables()
    sections = [tables.pop("which_mixer"), tables.pop("runs")]
    if comparison.runs_of_tasks:
        by_subset, heading = (
            accuracy.table(comparison.runs_of_tasks),
            "Accuracy at the target positions, each model at its best learning rate",
        )
        sections += [Section(heading, head=by_subset[0], body=by_subset[1], names=by_subset[0].index("mixer") + 1)]
    sections += [section for name, section in tables.items() if name == "crossings"]
    sections += [tradeoff.chart_section()]
    sections += [
        Section(heading, pictures={heading: picture})
        for (name, heading), picture in drawn.items()
        if name not in AS_CHARTS
    ]
    sections += notes_sections(comparison.results)
    sections += [section for name, section in tables.items() if name == "measurements"]
    if comparison.benchmark:
        sections += [replace(bench_report.table_section(comparison.benchmark), sortable=True)]
    left_out = [f"{path}: {reason}" for path, reason in comparison.skipped]
    sections += [Section("Left out", items=left_out)] if left_out else []
    sections[0] = tradeoff.explained(sections)
    files[out / "report.html"] = page(comparison.title, sections)
    write_together(files)
    remove_stale(out, files, plots=PLOTS)


def _runs_section(comparison: Comparison, rows: Sequence[table.Row], notes: Sequence[str]) -> Section:
    """The table of the runs with, for each row, whether it differs from the best, and the command that trains it."""
    groups = comparison.groups
    qualities = [quality for quality, _ in by_quality(groups)]
    of_group = {id(group): (same, quality_of(same)) for same in by_data(groups).values() for group in same}
    head, body = table.as_cells(rows)
    differs = [_differs(group, same, quality) for group in groups for same, quality in [of_group[id(group)]]]
    order = _order(head, [quality.key for quality in qualities])
    values = table.as_values(rows)
    own_columns = {column.key for column in table.COLUMNS}
    differing = [key for key in also_differing(comparison.runs) if key not in own_columns][:MOST_DIFFERING]
    settings_of = [_settings_of(group, differing) for group in groups]
    return Section(
        "Runs",
        head=[
            head[0],
            f"differs from the best in {' or '.join(one.title for one in qualities)}",
            *_ordered(head, order),
            *differing,
            "train it again",
        ],
        body=[
            [line[0], said, *_ordered(line, order), *chosen, reproduce(group, groups)]
            for line, said, chosen, group in zip(body, differs, settings_of, groups, strict=True)
        ],
        names=2,
        sortable=True,
        sort_by=[
            [line[0], None, *_ordered(line, order), *map(_number, chosen), None]
            for line, chosen in zip(values, settings_of, strict=True)
        ],
        hints=[
            "Losses are in nats per token, FLOP/token are those of a forward pass, and tokens those of the training. "
            "state: the memory that generation keeps for one sequence as long as the training context."
        ],
        notes=notes,
    )


def _differs(group: Group, groups: Sequence[Group], quality: Quality) -> str:
    """Whether it differs from the best of the groups of its data, in words."""
    best = best_of(groups, quality)
    same = ties(groups, best, quality)
    if group is best or group in same:
        return "no, several share the best value" if same else "this is the best"
    return {True: "no, within the spread over seeds", False: "yes", None: "unknown, one seed"}[
        within_spread(group, best, quality)
    ]


def _settings_of(group: Group, keys: Sequence[str]) -> list[str]:
    """The values of these settings, of all runs of the group."""
    found = [settings(run) for run in group.runs]
    return [", ".join(dict.fromkeys(one.get(key, NULL) for one in found)) for key in keys]


def _number(text: str) -> float | None:
    """What a cell is sorted by, if it is a number."""
    try:
        return float(text)
    except ValueError:
        return None


def _order(head: Sequence[str], keys: Sequence[str]) -> list[int]:
    """The columns behind the name of the row: first the seeds, then what says how good a model is, and its state."""
    headings = {column.key: column.heading for column in table.COLUMNS}
    first = ["seeds", *(headings[key] for key in keys), headings["state_bytes"]]
    places = [head.index(heading) for heading in dict.fromkeys(first) if heading in head]
    return [*places, *(n for n in range(1, len(head)) if n not in places)]


def _ordered(line: Sequence[Cell], order: Sequence[int]) -> list[Cell]:
    return [line[n] for n in order]


def _pictures(comparison: Comparison) -> dict[tuple[str, str], Picture]:
    """The plots by file name and heading.

    Losses are in nats with a second scale in bits per byte, or only in bits per byte across tokenizers. Runs of
    synthetic tasks have plots of accuracy instead.
    """
    drawn = _of_texts(comparison) | _of_tasks(comparison.runs_of_tasks) | _of_speeds(comparison)
    if not comparison.exclusive_device:
        drawn = {name: picture for name, picture in drawn.items() if name[0] != "loss_by_seconds"}
    return {name: picture for name, picture in drawn.items() if picture is not None}


def _of_speeds(comparison: Comparison) -> dict[tuple[str, str], Picture | None]:
    groups = comparison.groups
    if not groups:
        return {}
    found = measurements(comparison.results)
    picture = accuracy_by_speed(groups, found, quality_of(groups), exclusive_device=comparison.exclusive_device)
    return {("accuracy_by_speed", "Accuracy against speed"): picture}


def _of_tasks(runs: Sequence[Run]) -> dict[tuple[str, str], Picture | None]:
    if not runs:
        return {}
    lines = accuracy.lines(runs)
    return {
        ("accuracy_by_state", "Accuracy against the size of the state"): accuracy_plots.by_state(lines),
        ("accuracy_by_length", "Accuracy against length"): accuracy_plots.by_length(lines),
    }


def _of_texts(comparison: Comparison) -> dict[tuple[str, str], Picture | None]:
    groups = [group for group in comparison.groups if not accuracy.has_val_subsets(group.runs[0])]
    if not groups:
        return {}
    runs, across = [run for group in groups for run in group.runs], comparison.across_tokenizers
    texts = all(run.summary.get("val/bits_per_byte") is not None for run in runs)
    y, loss = ("val/bits_per_byte", "Bits per byte") if across and texts else ("val/loss", "Loss")
    scale = groups[0].mean("val/bits_per_byte") / groups[0].mean("val/loss") if texts and not across else None
    by_position = None if across else plots.loss_by_position(groups, bits_per_nat=scale)
    final = y.replace("val/", f"{reported_split(runs)}/")
    return {
        ("loss_by_tokens", f"{loss} against tokens"): plots.loss_curves(groups, x="tokens", y=y, bits_per_nat=scale),
        ("loss_by_seconds", f"{loss} against time"): plots.loss_curves(groups, x="seconds", y=y, bits_per_nat=scale),
        ("loss_by_position", "Loss by position in the context"): by_position,
        ("loss_by_model", f"{'Bits per byte' if texts else loss} of each model"): plots.loss_by_model(
            groups, y=final.replace("loss", "bits_per_byte") if texts else final
        ),
        ("loss_by_state", f"{loss} against the size of the state"): plots.loss_against_state(groups, y=final),
    }
