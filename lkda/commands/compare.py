"""Compare runs: a table, plots and a page."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from rich.console import Console

from lkda.checks import InputError, check_values
from lkda.commands.config import resolve
from lkda.report.draw.tables import rich_table
from lkda.report.training.comparison import compare as compare_runs
from lkda.report.training.table import as_cells

OPTIONS = {
    "runs": Path | Sequence[Path],
    "out": Path,
    "title": str,
    "step": int | None,
    "exclusive_device": bool,
    "bench": Path | Sequence[Path] | None,
}


def compare(config: DictConfig) -> None:
    """Compare the run directories that match `config.runs`, and write the result into `config.out`.

    Args:
        config: composed from configs/compare.yaml.
    Raises: InputError if nothing matches, if no match is a finished run, or if `out` cannot be written.
    """
    check_values(resolve(config), OPTIONS)
    directories = _find(config.runs, option="runs", what="run directories, as in runs='outputs/*'")
    what = "results of scripts/benchmark.py: files, or directories that hold some"
    benchmarks = [] if config.bench is None else _find(config.bench, option="bench", what=what)
    out = Path(config.out)
    try:
        result = compare_runs(
            directories,
            out,
            title=config.title,
            benchmarks=benchmarks,
            step=config.step,
            exclusive_device=config.exclusive_device,
        )
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}.") from error
    terminal = Console(highlight=False, markup=False, emoji=False)
    console = terminal if terminal.is_terminal else Console(width=140, highlight=False, markup=False, emoji=False)
    console.print(rich_table(*as_cells(result.rows)))
    for note in result.notes:
        console.print(note, style="dim")
    for path, reason in result.skipped:
        console.print(f"left out {path}: {reason}", style="yellow", soft_wrap=True)
    beside = "report.md, the tables as CSV, results.json and the plots are in the same directory."
    console.print(f"\nthe report is {out / 'report.html'}; {beside}", soft_wrap=True)


def _find(given: str | ListConfig, *, option: str, what: str) -> list[Path]:
    """The path with exactly this name if it exists, else the paths that match it as a glob. A list is searched entry by
    entry.

    Args:
        option, what: its name, and what it is to give, for messages.
    Raises: InputError if an entry matches nothing.
    """
    if not isinstance(given, str) and not given:
        raise InputError(f"{option} is empty: give {what}.")
    found: dict[Path, None] = {}
    for pattern in [given] if isinstance(given, str) else list(given):
        literal = [str(pattern)] if os.path.exists(str(pattern)) else []
        paths = literal or sorted(glob.glob(str(pattern), recursive=True))
        if not paths:
            raise InputError(f"{option}={pattern} matches nothing; give {what}.")
        found |= dict.fromkeys(Path(path) for path in paths)
    return list(found)
