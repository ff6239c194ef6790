"""Fills the blocks of README.md that hold results, from the JSON under docs/results, so that no number is typed.

    python -m lkda.report.readme

A block stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`, and shows docs/results/NAME/results.json,
as `scripts/compare.py` writes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lkda.report.files import write_atomically
from lkda.report.table import as_cells, markdown_table

_BLOCK = re.compile(r"<!-- results:(?P<name>[\w-]+) -->\n.*?<!-- /results:(?P=name) -->", re.DOTALL)


def fill(text: str, results: Path) -> str:
    """`text` with every block filled from `results`/NAME/results.json. Raises ValueError where one is not there."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        path = results / name / "results.json"
        if not path.is_file():
            raise ValueError(
                f"the block results:{name} needs {path}; write it with scripts/compare.py out={path.parent}."
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        notes = " ".join(found["notes"])
        return f"<!-- results:{name} -->\n{markdown_table(*as_cells(found['rows']))}\n{notes}\n<!-- /results:{name} -->"

    return _BLOCK.sub(block, text)


def main() -> None:
    """Rewrites README.md of the working directory."""
    readme = Path("README.md")
    try:
        write_atomically(readme, fill(readme.read_text(encoding="utf-8"), Path("docs/results")))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
