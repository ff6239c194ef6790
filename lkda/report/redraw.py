"""Draws results again from the JSON that lies in their directories: `python -m lkda.report.redraw docs/results/*`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lkda.checks import InputError
from lkda.report import bench_report, comparison, long_context, state_error
from lkda.report.bench import read_benchmark
from lkda.report.comparison import RESULTS, read_results

BENCHMARK, TABLE = "benchmark.json", "table.json"


def redraw(directory: Path) -> None:
    """Writes tables, plots and the page of the comparison, benchmark, state errors or evaluations in `directory` anew.

    Of a table alone nothing is drawn; `lkda.report.readme` shows it.

    Raises: ValueError where it holds none, or a file that is none.
    """
    if (directory / RESULTS).is_file():
        comparison.write(read_results(directory), directory)
    elif (directory / BENCHMARK).is_file():
        bench_report.write(read_benchmark(directory / BENCHMARK), directory)
    elif (directory / state_error.ERRORS).is_file():
        state_error.write(directory)
    elif (directory / long_context.EVALUATIONS).is_file():
        long_context.redraw(directory)
    elif not (directory / TABLE).is_file():
        known = (RESULTS, BENCHMARK, state_error.ERRORS, long_context.EVALUATIONS)
        raise InputError(f"{directory} holds none of {', '.join(known)}.")


def main(arguments: Sequence[str]) -> None:
    """Redraws each of the arguments that is a directory."""
    directories = [path for path in map(Path, arguments) if path.is_dir()]
    if not directories:
        raise SystemExit(__doc__)
    try:
        for directory in directories:
            redraw(directory)
            print(f"drew {directory}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main(sys.argv[1:])
