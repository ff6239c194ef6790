"""One self-contained HTML page: the table and the plots."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

from lkda.report.table import Row, as_lines

_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --faint: #6a6a6a; --line: #e2e2e2; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --faint: #a0a0a0; --line: #333333; --back: #141414; }
  img { filter: invert(0.92) hue-rotate(180deg); }
}
body { margin: 3rem auto; max-width: 74rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-weight: 600; font-size: 1.6rem; } h2 { font-weight: 600; font-size: 1.1rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 500; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
p.note, li { color: var(--faint); font-size: 0.9rem; }
"""


def page(
    title: str,
    table: Sequence[Row],
    plots: Mapping[str, bytes],
    *,
    notes: Sequence[str] = (),
    skipped: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        plots: heading -> PNG.
        notes: sentences under the table.
        skipped: what was left out, a line each.
    """
    head, body = as_lines(table)
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append(f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>')
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes]
    for heading, png in plots.items():
        data = base64.b64encode(png).decode()
        parts.append(f'<h2>{html.escape(heading)}</h2><figure><img alt="{html.escape(heading)}" ')
        parts.append(f'src="data:image/png;base64,{data}"></figure>')
    if skipped:
        left_out = "".join(f"<li>{html.escape(line)}</li>" for line in skipped)
        parts.append(f"<h2>Left out</h2><ul>{left_out}</ul>")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
