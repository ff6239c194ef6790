"""Draws the plots and tables of results again from their JSON: `python -m lkda.report.redraw docs/results/*`.

The kind that a file names decides what is drawn of it; the name of the file does not matter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lkda.checks import InputError
from lkda.report.operators import report as bench_report
from lkda.report.read.files import read_results_file
from lkda.report.studies import (
    budgets,
    by_source,
    decode,
    foreign_models,
    learning_rates,
    long_context,
    long_run,
    notes,
    peer_training,
    recipe,
    scaling,
    state_dtypes,
    state_error,
    step_benchmark,
)
from lkda.report.tradeoff import report as tradeoff
from lkda.report.training import comparison

# The kinds of results files, each with the function that draws it; None where there is nothing to draw.
KINDS: dict[str, Callable[[Path], None] | None] = {
    "comparison": comparison.redraw,  # written by scripts/compare.py
    "benchmark": bench_report.redraw,  # written by scripts/benchmark.py
    "step_benchmark": step_benchmark.redraw,  # written by scripts/benchmark.py task=step
    "whole_set": tradeoff.redraw,  # written by scripts/benchmark.py without options
    "decode": decode.redraw,  # written by scripts/benchmark.py task=decode
    "state_error": state_error.redraw,  # written by lkda.bench.state_error
    "long_context": long_context.redraw,
    "long_run": long_run.redraw,  # written by lkda.commands.studies.long_run
    "state_dtypes": state_dtypes.redraw,
    "by_source": by_source.redraw,
    "budgets": budgets.redraw,
    "recipe": recipe.redraw,
    "learning_rates": learning_rates.redraw,
    "notes": notes.redraw,  # written by scripts/benchmark.py task=notes
    "peer_training": peer_training.redraw,  # written by lkda.commands.studies.peer_training
    "scaling": scaling.redraw,  # written by lkda.commands.studies.scaling
    "foreign_models": foreign_models.redraw,  # written by lkda.bench.foreign_models
    "evaluation": None,  # written by scripts/evaluate.py out=; long_context and state_dtypes collect them
    "table": None,  # lkda.report.readme writes it into a page
    "measurements": None,  # kept as they were measured
}


def source(directory: Path) -> Path | None:
    """The results file of `directory` that is drawn; None where there is nothing to draw.

    Raises: ValueError where there is no results file, where one names no known kind, or where the plots of two files
        would overwrite each other.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise InputError(f"{directory} holds no results: there is no JSON file in it.")
    drawn = [path for path in paths if KINDS[_kind(path)] is not None]
    if len(drawn) > 1:
        names = " and ".join(path.name for path in drawn)
        raise InputError(
            f"{directory} holds {names}, whose plots would overwrite each other: keep each in a directory of its own."
        )
    return drawn[0] if drawn else None


def redraw(path: Path) -> None:
    """Writes the plots and tables of a results file beside it. Raises: ValueError where it is not of its kind."""
    draw = KINDS[_kind(path)]
    if draw is not None:
        draw(path)


def _kind(path: Path) -> str:
    kind = read_results_file(path)["kind"]
    if kind not in KINDS:
        raise InputError(f"{path} is of the kind {kind}, which is unknown; there are {', '.join(KINDS)}.")
    return kind


def main(arguments: Sequence[str]) -> None:
    """Redraws each argument that is a directory, after checking that all of them hold results."""
    directories = [path for path in map(Path, arguments) if path.is_dir()]
    if not directories:
        raise SystemExit(__doc__)
    try:
        for directory, path in {directory: source(directory) for directory in directories}.items():
            if path is None:
                print(f"{directory}: nothing to draw")
                continue
            redraw(path)
            print(f"{directory}: drawn from {path.name}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
