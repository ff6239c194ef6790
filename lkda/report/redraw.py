"""Draws results again from the JSON in their directories: `python -m lkda.report.redraw docs/results/*`.

What is drawn of a file is decided by the kind that stands in it, whatever the file is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lkda.checks import InputError
from lkda.report.operators import report as bench_report
from lkda.report.read.files import read_results_file
from lkda.report.studies import long_context, peer_training, recipe, state_dtypes, state_error
from lkda.report.training import comparison

# Every kind of results file, with what draws it; None where nothing is drawn of it.
KINDS: dict[str, Callable[[Path], None] | None] = {
    "comparison": comparison.redraw,  # of scripts/compare.py
    "benchmark": bench_report.redraw,  # of scripts/benchmark.py
    "state_error": state_error.redraw,  # of lkda.bench.state_error
    "long_context": long_context.redraw,
    "state_dtypes": state_dtypes.redraw,
    "recipe": recipe.redraw,
    "peer_training": peer_training.redraw,  # of lkda.commands.peer_training
    "evaluation": None,  # of scripts/evaluate.py out=; the two above gather them
    "table": None,  # lkda.report.readme shows it on a page
    "measurements": None,  # kept as they were taken
}


def source(directory: Path) -> Path | None:
    """The results file of `directory` that its tables, plots and page are drawn from; None where nothing is drawn.

    Raises: ValueError where there is no results file, one is of no or of an unknown kind, or two would be drawn over
        each other.
    """
    paths = sorted(directory.glob("*.json"))
    if not paths:
        raise InputError(f"{directory} holds no results: there is no JSON file in it.")
    drawn = [path for path in paths if KINDS[_kind(path)] is not None]
    if len(drawn) > 1:
        names = " and ".join(path.name for path in drawn)
        raise InputError(f"{directory} holds {names}, which would be drawn over each other: keep one in a directory.")
    return drawn[0] if drawn else None


def redraw(path: Path) -> None:
    """Writes what is drawn of a results file anew, beside it. Raises: ValueError where it is not what it says."""
    draw = KINDS[_kind(path)]
    if draw is not None:
        draw(path)


def _kind(path: Path) -> str:
    kind = read_results_file(path)["kind"]
    if kind not in KINDS:
        raise InputError(f"{path} is of the kind {kind}, which is unknown; there are {', '.join(KINDS)}.")
    return kind


def main(arguments: Sequence[str]) -> None:
    """Redraws each of the arguments that is a directory, once all of them are known to hold results."""
    directories = [path for path in map(Path, arguments) if path.is_dir()]
    if not directories:
        raise SystemExit(__doc__)
    try:
        for directory, path in {directory: source(directory) for directory in directories}.items():
            if path is None:
                print(f"{directory}: nothing is drawn of what it holds")
                continue
            redraw(path)
            print(f"{directory}: drawn from {path.name}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
