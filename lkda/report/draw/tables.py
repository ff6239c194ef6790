"""Tables for the terminal and for pages, from headings and cells of text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from rich.table import Table

HEADING_WIDTH = 16  # characters; longer headings are broken into lines, in the terminal


def rich_table(head: Sequence[str], body: Sequence[Sequence[str]], *, names: int = 1) -> Table:
    """For the terminal. The first `names` columns are aligned to the left, the others, numbers, to the right. A name
    that has no room is broken into lines."""
    shown = Table(header_style="bold", box=None, pad_edge=False)
    for n, heading in enumerate(head):
        look: dict[str, Any] = {"justify": "right", "no_wrap": True} if n >= names else {"overflow": "fold"}
        shown.add_column(textwrap.fill(heading, HEADING_WIDTH), **look)
    for line in body:
        shown.add_row(*line)
    return shown


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """For a page: a Markdown table. A cell stays one cell and no HTML, whatever characters it has."""
    lines = [[*map(_escaped, head)], ["---" if n < names else "---:" for n in range(len(head))]]
    lines += [[*map(_escaped, line)] for line in body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """For a page: text without HTML, whatever characters it has."""
    return re.sub(r"(?<!\\)<(?=[A-Za-z/!?])", "&lt;", text)


def _escaped(cell: str) -> str:
    """Without ends of lines, and with what Markdown would take for the next column escaped, once."""
    return markdown_text(re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.splitlines())))
