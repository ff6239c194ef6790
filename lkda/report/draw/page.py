"""A self-contained HTML page of tables and plots, for light and dark screens."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lkda.report.draw.style import DARK, LIGHT, Picture

_STYLE = f"""
:root {{ color-scheme: light dark;
  --text: {LIGHT.text}; --faint: {LIGHT.faint}; --line: {LIGHT.grid}; --back: {LIGHT.background}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: {DARK.text}; --faint: {DARK.faint}; --line: {DARK.grid}; --back: {DARK.background}; }} }}
body {{ margin: 3.5rem auto 5rem; max-width: 70rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-weight: 600; font-size: 1.7rem; margin: 0 0 1.5rem; }}
h2 {{ font-weight: 600; font-size: 1.15rem; margin: 3.2rem 0 0.8rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.45rem 0 0.45rem 0.9rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--faint); font-weight: 500; }}
.name {{ text-align: left; padding-left: 0; padding-right: 0.9rem; }}
figure {{ margin: 0 0 1.8rem; }} .note + figure {{ margin-top: 1.8rem; }}
img {{ display: block; width: 100%; max-width: 46rem; height: auto; }}
p.note, li {{ color: var(--faint); font-size: 0.875rem; margin: 0.35rem 0; }}
.scroll + p.note {{ margin-top: 1rem; }} ul {{ padding-left: 1.1rem; }}
"""


@dataclass(frozen=True)
class Section:
    """A section of the page. Its contents appear in the order of the attributes.

    Attributes:
        heading: empty for the first section, which follows the title.
        head, body: headings and cells of the table, whose first `names` columns are names.
        notes: sentences below the table.
        pictures: {alternative text: plot}.
        items: the items of a list.
    """

    heading: str = ""
    head: Sequence[str] = ()
    body: Sequence[Sequence[str]] = ()
    names: int = 1
    notes: Sequence[str] = ()
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    items: Sequence[str] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML. All text is escaped."""
    body = "\n".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>"] if section.heading else []
    if section.body:
        lines = "".join(_line("td", line, section.names) for line in section.body)
        head = _line("th", section.head, section.names)
        parts.append(f'<div class="scroll"><table><thead>{head}</thead><tbody>{lines}</tbody></table></div>')
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    parts += [_figure(name, picture) for name, picture in section.pictures.items()]
    if section.items:
        parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
    return "".join(parts)


def _line(tag: str, cells: Sequence[str], names: int) -> str:
    opened = [f'<{tag} class="name">' if n < names else f"<{tag}>" for n in range(len(cells))]
    return "<tr>" + "".join(f"{tag_}{html.escape(cell)}</{tag}>" for tag_, cell in zip(opened, cells)) + "</tr>"


def _figure(name: str, picture: Picture) -> str:
    return (
        f'<figure><picture><source srcset="{_data(picture.dark)}" media="(prefers-color-scheme: dark)">'
        f'<img alt="{html.escape(name)}" src="{_data(picture.light)}"></picture></figure>'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
