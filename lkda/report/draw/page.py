"""A self-contained HTML page of tables, plots and charts, for light and dark screens."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lkda.report.draw.assets import scripts, styles
from lkda.report.draw.chart import Chart
from lkda.report.draw.style import DARK, LIGHT, Picture
from lkda.report.draw.units import length, quantity

LONG = 40  # characters of a cell

_STYLE = f"""
:root {{ color-scheme: light dark;
  --text: {LIGHT.text}; --faint: {LIGHT.faint}; --line: {LIGHT.grid}; --back: {LIGHT.background}; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: {DARK.text}; --faint: {DARK.faint}; --line: {DARK.grid}; --back: {DARK.background}; }} }}
body {{ margin: 3.5rem auto 5rem; max-width: 86rem; padding: 0 1.5rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }}
h1 {{ font-weight: 600; font-size: 1.7rem; margin: 0 0 1.5rem; }}
h2 {{ font-weight: 600; font-size: 1.15rem; margin: 3.2rem 0 0.8rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 0.875rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.45rem 0 0.45rem 0.9rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }}
th {{ color: var(--faint); font-weight: 500; white-space: normal; vertical-align: bottom; }}
.name {{ text-align: left; padding-left: 0; padding-right: 0.9rem; }}
td.name {{ white-space: normal; }} td.name:first-child {{ min-width: 7rem; }}
td.name.long {{ min-width: 14rem; }} td.wraps {{ white-space: normal; min-width: 9rem; }}
figure {{ margin: 0 0 1.8rem; }} .note + figure {{ margin-top: 1.8rem; }}
img {{ display: block; width: 100%; max-width: 46rem; height: auto; }}
p.note, li {{ color: var(--faint); font-size: 0.875rem; margin: 0.35rem 0; max-width: 60rem; }}
.scroll + p.note {{ margin-top: 1rem; }} ul {{ padding-left: 1.1rem; }}
p.lead {{ font-size: 1.05rem; max-width: 46rem; }}
h3 {{ font-weight: 600; font-size: 1rem; margin: 2.4rem 0 0.2rem; }}
.chart {{ width: 100%; max-width: 52rem; min-height: 21rem; }} .chart select {{ max-width: 100%; }}
.chart-wrapper {{ display: flex; flex-direction: column; }}
.chart .vega-bindings {{ order: -1; margin-bottom: 0.6rem; font-size: 0.875rem; }}
table.sortable td, table.sortable th {{ text-align: left; }}
table.sortable .dt-type-numeric {{ text-align: right; }}
table.sortable th.name {{ max-width: 11rem; }}
[role=region][data-wide]::before {{ content: "Scroll sideways for more \\2192"; display: block;
  position: sticky; left: 0; width: max-content; margin-bottom: 0.4rem; font-size: 0.875rem; font-weight: 600; }}
table.sortable td:last-child:not(.dt-type-numeric) {{ white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }}
html:root.dark {{ --dt-html-background: var(--back); }}
div.dtcc-dropdown button.dtcc-button span.dtcc-button-text {{ white-space: normal; overflow-wrap: anywhere; }}
#vg-tooltip-element {{ max-width: calc(100vw - 16px); box-sizing: border-box; }}
#vg-tooltip-element.vg-tooltip {{ background-color: var(--back); }}
#vg-tooltip-element table tr td {{ overflow: visible; overflow-wrap: anywhere; white-space: normal; border: 0;
  padding: 2px 4px; font-size: 0.75rem; line-height: 1.3; }}
#vg-tooltip-element table tr td.value {{ max-width: min(20rem, calc(100vw - 12rem)); max-height: none; }}
td button.dtcc-button_dropdown {{ opacity: 1 !important; }}
td .dtcc-button_active.dtcc-button_dropdown > .dtcc-button-text {{ color: var(--text); font-weight: 600; }}
td .dtcc-button_dropdown > .dtcc-button-text {{ display: inline !important; font-size: 0.75rem; color: var(--faint); }}
nav {{ font-size: 0.875rem; margin: -0.8rem 0 1.5rem; }} a {{ color: inherit; }}
summary {{ cursor: pointer; color: var(--faint); }}
td code {{ display: block; font-size: 0.75rem; white-space: pre-wrap; overflow-wrap: anywhere;
  user-select: all; }}
.terms {{ font-size: 0.875rem; max-width: 60rem; margin: 1.2rem 0; }} dt {{ font-weight: 600; margin-top: 0.4rem; }}
dd {{ margin: 0; color: var(--faint); }}
@media (min-width: 800px) {{ dl {{ display: grid; grid-template-columns: 10rem 1fr; gap: 0.2rem 1rem; }}
  dt {{ margin: 0; }} }}
@media (max-width: 600px) {{ body {{ margin-top: 1.5rem; padding: 0 0.8rem; }} h1 {{ font-size: 1.35rem; }}
  #vg-tooltip-element {{ left: 8px !important; }}
  table.stacked, table.stacked :is(thead, tbody, tbody tr, tbody td) {{ display: block; }}
  table.stacked thead tr {{ display: flex; flex-wrap: wrap; }}
  table.stacked thead :is(th, td) {{ border: 0 !important; }}
  table.stacked tbody tr {{ padding: 0.6rem 0; border-bottom: 1px solid var(--line); }}
  table.stacked tbody td {{ padding: 0 !important; border: 0 !important; text-align: left !important; }}
  table.stacked:not(.sortable) thead {{ display: none; }} table.stacked tbody td:first-child {{ font-weight: 600; }}
  table.stacked tbody td:not(:first-child)::before {{ content: attr(data-label) ": "; color: var(--faint); }}
  table.stacked tbody td:empty {{ display: none; }} }}
"""


@dataclass(frozen=True)
class Section:
    """A section of the page. Its contents appear in the order of the attributes.

    Attributes:
        heading: empty for the first section, which follows the title.
        terms: {word: meaning}, folded.
        lead: paragraphs in larger letters, with empty lines between them.
        hints: paragraphs above the table.
        head, body: headings and cells of the table, whose first `names` columns are names.
        sortable: whether the reader can sort and filter the table.
        lists: the columns that the reader filters by choosing from a list of their cells.
        sort_by: for each row what its cells are sorted by, where that is not their text.
        notes: sentences below the table.
        pictures: {alternative text: plot}.
        charts: interactive charts, each with its title and caption.
        items: the items of a list.
    """

    heading: str = ""
    terms: Mapping[str, str] = field(default_factory=dict)
    lead: str = ""
    hints: Sequence[str] = ()
    head: Sequence[str] = ()
    body: Sequence[Sequence[str]] = ()
    names: int = 1
    sortable: bool = False
    lists: Sequence[int] = ()
    sort_by: Sequence[Sequence[float | str | None]] = ()
    notes: Sequence[str] = ()
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    charts: Sequence[Chart] = ()
    items: Sequence[str] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML. All text is escaped. Only a page with charts or sortable tables has scripts, which it carries
    with it."""
    body = "\n".join(_section(section) for section in sections)
    charts = {chart.name: chart.embedded() for section in sections for chart in section.charts}
    interactive = bool(charts) or any(section.sortable for section in sections)
    sheets = f"<style>{styles()}</style>" if interactive else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>{sheets}<style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{_contents(sections)}{body}\n"
        f"{_scripts(charts) if interactive else ''}</body></html>\n"
    )


def _scripts(charts: Mapping[str, object]) -> str:
    data = json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="charts">{data}</script>\n{scripts()}\n'


def _section(section: Section) -> str:
    parts = [f'<h2 id="{_anchor(section)}">{html.escape(section.heading)}</h2>'] if section.heading else []
    parts += [_terms(section.terms)] if section.terms else []
    parts += [f'<p class="lead">{html.escape(lead)}</p>' for lead in section.lead.split("\n\n") if lead]
    if section.body:
        parts += [f'<p class="note">{html.escape(hint)}</p>' for hint in section.hints]
        parts.append(_table(section))
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in section.notes]
    parts += [_figure(name, picture) for name, picture in section.pictures.items()]
    parts += [_chart(chart) for chart in section.charts]
    if section.items:
        parts.append("<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in section.items) + "</ul>")
    return "".join(parts)


def _terms(terms: Mapping[str, str]) -> str:
    meanings = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(said)}</dd>" for word, said in terms.items())
    names = html.escape(", ".join(terms))
    return f'<details class="terms"><summary>The words of this page: {names}</summary><dl>{meanings}</dl></details>'


def _anchor(section: Section) -> str:
    return "section-" + "".join(letter if letter.isalnum() else "-" for letter in section.heading.lower())


def _contents(sections: Sequence[Section]) -> str:
    """Links to the headings; of those that begin alike, as in "The notes: claims", to the first."""
    named: dict[str, Section] = {}
    for section in sections:
        if section.heading:
            named.setdefault(section.heading.partition(": ")[0], section)
    links = " · ".join(f'<a href="#{_anchor(one)}">{html.escape(name)}</a>' for name, one in named.items())
    return f'<nav aria-label="contents">{links}</nav>\n' if len(named) > 1 else ""


def _table(section: Section) -> str:
    """The keyboard scrolls a table that is wider than the screen once it has the focus."""
    # On a phone, the cells of a table of text, and those of the answers, stand below each other.
    stacked = " stacked" if section.lead or section.names == len(section.head) else ""
    labels = section.head if stacked else ()
    orders = section.sort_by or (_orders(section.body) if section.sortable else [()] * len(section.body))
    lengths = _lengths(section.body, orders) if section.sortable else set()
    lines = "".join(
        _line("td", line, section.names, by, lengths, labels) for line, by in zip(section.body, orders, strict=True)
    )
    head = _line("th", section.head, section.names)
    label = f'aria-label="{html.escape(section.heading or "table")}"'
    lists = f"data-lists='{json.dumps(list(section.lists))}'"
    name = f' class="{stacked.strip()}"' if stacked else ""
    name = f' class="sortable display compact{stacked}" {label} {lists}' if section.sortable else name
    region = (
        "" if section.sortable else f' tabindex="0" role="region" {label}'
    )  # of a sortable one, its script makes one
    return f'<div class="scroll"{region}><table{name}><thead>{head}</thead><tbody>{lines}</tbody></table></div>'


def _orders(body: Sequence[Sequence[str]]) -> list[list[float | None]]:
    """What cells are sorted by: in a column of numbers with units, the numbers; -1 stands for a missing one."""
    columns = []
    for cells in zip(*body, strict=True):
        values = [quantity(cell) for cell in cells]
        numbers = all(value is not None for cell, value in zip(cells, values, strict=True) if cell)
        columns.append([(-1 if value is None else value) if numbers else None for value in values])
    return [list(line) for line in zip(*columns, strict=True)]


def _lengths(body: Sequence[Sequence[str]], orders: Sequence[Sequence[float | str | None]]) -> set[int]:
    """The columns of lengths, as in 8K."""
    return {
        n
        for line, by in zip(body, orders, strict=True)
        for n, (cell, order) in enumerate(zip(line, by, strict=True))
        if isinstance(order, int) and order > 0 and cell == length(order)
    }


def _line(
    tag: str,
    cells: Sequence[str],
    names: int,
    sort_by: Sequence[float | str | None] = (),
    lengths: Collection[int] = (),
    labels: Sequence[str] = (),
) -> str:
    """A row of a table. A cell that is a command is folded, and a length is found as 8K, 8,192 and 8192. Long text
    beside the first column gets some width, so that a row is not high on a narrow screen."""
    written = []
    for n, cell in enumerate(cells):
        order = sort_by[n] if n < len(sort_by) else None
        command = cell.startswith("python ")
        kind = "name long" if n > 0 and len(cell) > LONG and not command else "name"
        kind = kind if n < names else "wraps" if len(cell) > LONG / 2 and not command else ""
        attributes = f' class="{kind}"' if kind else ""
        attributes += f' data-label="{html.escape(labels[n])}"' if labels else ""
        attributes += f' data-order="{html.escape(str(order))}"' if order is not None else ""
        if n in lengths:  # in each row, else DataTables searches the column by its text
            numbers = f" {order:,} {order}" if isinstance(order, int) and cell else ""
            attributes += f' data-search="{html.escape(cell)}{numbers}"'
        text = html.escape(cell)
        if command:
            text = f"<details><summary>command</summary><code>{text}</code></details>"
        written.append(f"<{tag}{attributes}>{text}</{tag}>")
    return f"<tr>{''.join(written)}</tr>"


def _chart(chart: Chart) -> str:
    more = " The menu has other settings." if "params" in chart.spec else ""
    stop = "." if more and not chart.caption.endswith(".") else ""
    caption = f'<p class="note">{html.escape(chart.caption)}{stop}{more}</p>' if chart.caption else ""
    return f'<h3>{html.escape(chart.title)}</h3>{caption}<div class="chart" id="{html.escape(chart.name)}"></div>'


def _figure(name: str, picture: Picture) -> str:
    return (
        f'<figure><picture><source srcset="{_data(picture.dark)}" media="(prefers-color-scheme: dark)">'
        f'<img alt="{html.escape(name)}" src="{_data(picture.light)}"></picture></figure>'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
