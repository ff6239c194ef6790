"""Fills the blocks of README.md and docs/**/*.md that hold results, from the JSON under docs/results, so that no
number is typed.

    python -m lkda.report.readme

A block stands between `<!-- KIND:NAME -->` and `<!-- /KIND:NAME -->`, and shows a file of docs/results/NAME:

    results     results.json, as `scripts/compare.py` writes it: the table of runs
    accuracy    the same file: synthetic tasks, by subset of the validation
    summary     the same file: the paragraphs on top of the page
    answers     the same file: the best mixer by accuracy, and the fastest at each context
    crossings   the same file: where KDA overtakes softmax attention
    benchmark   benchmark.json, as `scripts/benchmark.py` writes it: every row
    peers       the same file: the device's times of all implementations, side by side
    by_shape    the same file: a line for each shape and decay, with eager times and the peak memory
    table       table.json: {"kind": "table", "rows": [{column: text or number}], "note": text}
    agreement   agreement.json of the same form: losses on several GPUs beside those on one
    notes_X     notes.json, as `scripts/benchmark.py task=notes` writes it: the table X of `lkda.report.studies.notes`
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.tables import markdown_table
from lkda.report.draw.units import length
from lkda.report.operators.benchmark import as_markdown, read_benchmark
from lkda.report.operators.by_shape import by_shape, remark
from lkda.report.operators.peers import side_by_side
from lkda.report.operators.report import metadata
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import from_record
from lkda.report.studies import notes
from lkda.report.tradeoff.crossings import pairs
from lkda.report.training import accuracy
from lkda.report.training.comparison import KIND as COMPARISON
from lkda.report.training.comparison import read_comparison
from lkda.report.training.table import as_cells


def _runs(path: Path) -> str:
    found = read_results_file(path, kind=COMPARISON)
    return markdown_table(*as_cells(found["rows"])) + "\n" + " ".join(found["notes"])


def _accuracy(path: Path) -> str:
    found = [from_record(record) for record in read_results_file(path, kind=COMPARISON)["runs"]]
    head, body = accuracy.table(found)
    return markdown_table(head, body, names=head.index("mixer") + 1)


def _benchmark(path: Path) -> str:
    benchmark = read_benchmark(path)
    return as_markdown(benchmark.rows) + "\n" + metadata(benchmark)


def _peers(path: Path) -> str:
    benchmark = read_benchmark(path)
    return markdown_table(*side_by_side(benchmark.rows), names=2) + "\n" + metadata(benchmark)


def _by_shape(path: Path) -> str:
    benchmark = read_benchmark(path)
    table = markdown_table(*by_shape(benchmark.rows), names=2)
    return f"{table}\n{metadata(benchmark)} {remark(benchmark)}"


def _table(path: Path) -> str:
    found = read_results_file(path, kind="table")
    rows = found["rows"]
    return markdown_table([*rows[0]], [[_cell(x) for x in row.values()] for row in rows]) + "\n" + found["note"]


def _cell(x: str | float | bool) -> str:
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, str):
        return x
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def _summary(path: Path) -> str:
    return "\n".join(f"> {line}".rstrip() for line in read_comparison(path).tradeoff.summary.split("\n")) + "\n"


def _answers(path: Path) -> str:
    first = read_comparison(path).tradeoff.first_section()
    return "\n".join([markdown_table(first.head, first.body, names=5), *first.notes])


def _crossings(path: Path) -> str:
    """Between lkda's KDA and softmax attention."""
    found = pairs(read_comparison(path).tradeoff.found)
    between = [pair for pair in found if pair.own and set(pair.mixers) == {"kda", "softmax"}]
    body = [[pair.stage, pair.where, pair.text, f"{pair.ratio:.2f}", length(pair.longest)] for pair in between]
    return markdown_table(
        ["stage", "measured with", "finding", "times faster at the longest context", "longest context"], body, names=3
    )


KINDS: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "results": ("results.json", "scripts/compare.py", _runs),
    "accuracy": ("results.json", "scripts/compare.py", _accuracy),
    "benchmark": ("benchmark.json", "scripts/benchmark.py", _benchmark),
    "peers": ("benchmark.json", "scripts/benchmark.py", _peers),
    "by_shape": ("benchmark.json", "scripts/benchmark.py", _by_shape),
    "table": ("table.json", "what measures it,", _table),
    "summary": ("results.json", "scripts/compare.py", _summary),
    "answers": ("results.json", "scripts/compare.py", _answers),
    "crossings": ("results.json", "scripts/compare.py", _crossings),
    "agreement": ("agreement.json", "lkda.commands.studies.scaling", _table),
    **{
        f"notes_{name}": ("notes.json", "scripts/benchmark.py task=notes", partial(notes.block, name))
        for name in notes.TITLES
    },
}
_BLOCK = re.compile(
    rf"<!-- (?P<kind>{'|'.join(KINDS)}):(?P<name>[\w-]+) -->\n.*?<!-- /(?P=kind):(?P=name) -->", re.DOTALL
)


def fill(text: str, results: Path) -> str:
    """`text` with every block filled from `results`/NAME. Raises: ValueError where the JSON does not exist."""

    def block(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        file, script, table = KINDS[kind]
        path = results / name / file
        if not path.is_file():
            raise InputError(f"the block {kind}:{name} needs {path}; write it with {script} out={path.parent}.")
        return f"<!-- {kind}:{name} -->\n{table(path)}\n<!-- /{kind}:{name} -->"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Rewrites README.md and the pages under docs/ of the working directory."""
    try:
        for page in (Path("README.md"), *sorted(Path("docs").rglob("*.md"))):
            text = page.read_text(encoding="utf-8")
            filled = fill(text, Path("docs/results"))
            if filled != text:
                write_atomically(page, filled)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
