"""Compare runs: a table, plots and a page."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from rich.console import Console

from lkda.checks import InputError, check_values
from lkda.commands.run.train_again import train_again
from lkda.commands.settings.config import resolve
from lkda.commands.wandb_report import offline_runs, send_report, sync_command
from lkda.io import file_in_the_way
from lkda.report.draw.tables import rich_table
from lkda.report.training.comparison import Comparison
from lkda.report.training.comparison import compare as compare_runs
from lkda.report.training.table import as_cells

OPTIONS = {
    "runs": Path | Sequence[Path],
    "out": Path,
    "title": str,
    "step": int | None,
    "exclusive_device": bool,
    "bench": Path | Sequence[Path] | None,
    "wandb": str | None,
}

_PROJECT = r"[^/\\#?%:]{1,128}"  # of W&B


def compare(config: DictConfig) -> None:
    """Compare the run directories that match `config.runs`, and write the result into `config.out`.

    Args:
        config: composed from configs/compare.yaml.
    Raises: InputError if nothing matches, if no match is a finished run, or if `out` cannot be written.
    """
    check_values(resolve(config), OPTIONS)
    if config.wandb is not None and not re.fullmatch(_PROJECT, config.wandb):
        raise InputError(
            f"wandb={config.wandb} must be the name of a project: up to 128 characters, none of / \\ # ? % :."
        )
    directories = _find(config.runs, option="runs", what="run directories, as in runs='outputs/*'")
    what = "results of scripts/benchmark.py: files, or directories that hold some"
    benchmarks = [] if config.bench is None else _find(config.bench, option="bench", what=what)
    out = Path(config.out)
    if (reason := file_in_the_way(out)) is not None:
        raise InputError(f"out={out}: {reason}")
    try:
        result = compare_runs(
            directories,
            out,
            title=config.title,
            benchmarks=benchmarks,
            step=config.step,
            exclusive_device=config.exclusive_device,
            train_again=train_again,
        )
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}.") from error
    terminal = Console(highlight=False, markup=False, emoji=False)
    console = terminal if terminal.is_terminal else Console(width=140, highlight=False, markup=False, emoji=False)
    # Into a file or a pipe, the table is as wide as it needs to be.
    wide = terminal if terminal.is_terminal else Console(width=400, highlight=False, markup=False, emoji=False)
    wide.print(rich_table(*as_cells(result.rows)))
    for note in result.notes:
        console.print(note, style="dim")
    for path, reason in result.skipped:
        console.print(f"left out {path}: {reason}", style="yellow", soft_wrap=True)
    beside = "report.md, the tables as CSV, results.json and the plots are in the same directory."
    console.print(f"\nthe report is {out / 'report.html'}; {beside}", soft_wrap=True)
    if config.wandb is not None:
        _send(result, directories, out, config.wandb, console)


def _send(result: Comparison, directories: Sequence[Path], out: Path, project: str, console: Console) -> None:
    """Send the report to W&B, and say which runs and whether the report itself are still to be sent, and how."""
    reason = send_report(result, out, project=project)
    runs = offline_runs(directories)
    if reason is None:
        console.print(f"the report is in the project {project} of W&B.")
    if runs:
        how_many = "1 run was" if len(runs) == 1 else f"{len(runs)} runs were"
        console.print(f"{how_many} logged offline: {', '.join(map(str, runs))}.", soft_wrap=True)
    waiting = runs | (offline_runs([out]) if reason is not None else {})
    if reason is not None:
        console.print(f"wandb: the report was logged offline, because {reason}.", soft_wrap=True)
    if waiting:
        console.print(f"send what is offline to W&B: {sync_command(waiting, project=project)}", soft_wrap=True)


def _find(given: str | ListConfig, *, option: str, what: str) -> list[Path]:
    """The path with exactly this name if it exists, else the paths that match it as a glob. A list is searched entry by
    entry.

    Args:
        option, what: its name, and what it is to give, for messages.
    Raises: InputError if an entry matches nothing.
    """
    if not isinstance(given, str) and not given:
        raise InputError(f"{option} is empty: give {what}.")
    found: dict[Path, Path] = {}  # a directory that is given twice, as a and b/../a, is one
    for pattern in [given] if isinstance(given, str) else list(given):
        literal = [str(pattern)] if os.path.exists(str(pattern)) else []
        paths = literal or sorted(glob.glob(str(pattern), recursive=True))
        if not paths:
            raise InputError(f"{option}={pattern} matches nothing; give {what}.")
        found |= {Path(path).resolve(): Path(path) for path in paths}
    return list(found.values())
