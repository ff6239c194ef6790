"""How well models predict each source of a corpus, from files of `scripts/evaluate.py out=`.

    python -m lkda.report.studies.by_source 'multirun/lm_by_mixer_full/*/test.json' outputs/by_source

The files are evaluations on a prepared corpus. This writes evaluations.json, which holds what it read, and table.json
with a row for each mixer and a column for each source. A cell is the mean over runs of the bits per byte, and in
brackets, with several runs, their standard deviation. The best of a column is in bold.
An evaluations.json that it wrote before may be among the files: what it holds is added.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.tables import rich_table
from lkda.report.read.evaluations import Record, evaluations_of_arguments, keep_evaluations, kept_evaluations

KIND = "by_source"
_ALL = "all"


def rows(records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each mixer, the best first, with its bits per byte of the whole split and of each source.

    Raises: InputError where an evaluation was not of a corpus with sources, or where the corpora differ.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    sources: list[str] = []
    for record in records:
        measured = record["result"].get("by_source")
        if not measured:
            raise InputError("an evaluation has no sources: evaluate on a corpus of scripts/prepare_data.py.")
        if sources and [*measured] != sources:
            raise InputError(f"the evaluations are of other sources: {', '.join(sources)}; {', '.join(measured)}.")
        sources = [*measured]
        own = found[record["run"]["mixer"]]
        own[_ALL].append(record["result"]["bits_per_byte"])
        for source in sources:
            own[source].append(measured[source]["bits_per_byte"])
    columns = [_ALL, *sources]
    best = {column: min(statistics.fmean(own[column]) for own in found.values()) for column in columns}
    order = sorted(found, key=lambda mixer: statistics.fmean(found[mixer][_ALL]))
    return [
        {"mixer": mixer} | {column: _cell(found[mixer][column], best[column]) for column in columns} for mixer in order
    ]


def _cell(values: Sequence[float], best: float) -> str:
    mean = statistics.fmean(values)
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"**{mean:.3f}**{spread}" if mean == best else f"{mean:.3f}{spread}"


def write(records: Sequence[Record], directory: Path) -> list[dict[str, str]]:
    """Writes table.json into `directory`. Returns: its rows. Raises: InputError as `rows` does."""
    made = rows(records)
    note = "Bits per byte of the whole split and of each source. The best of a column is in bold."
    several = " In brackets: the standard deviation over runs." if any("(" in row[_ALL] for row in made) else ""
    table = {"kind": "table", "rows": made, "note": note + several}
    write_atomically(directory / "table.json", json.dumps(table, indent=1) + "\n")
    return made


def redraw(path: Path) -> None:
    """Writes the table of kept evaluations beside them. Raises: ValueError where there are none."""
    write(kept_evaluations(path, kind=KIND), path.parent)


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of files, then the directory to write into."""
    try:
        records, out = evaluations_of_arguments(arguments, usage=__doc__)
        rows(records)  # raises before anything is written
        keep_evaluations(records, out, kind=KIND)
        made = write(records, out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    Console(width=150).print(rich_table([*made[0]], [[*row.values()] for row in made]))


if __name__ == "__main__":
    main(sys.argv[1:])
