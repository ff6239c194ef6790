"""The page as text: what is written in it stays text, and what its tables are sorted by."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from lkda.report.draw.chart import Chart
from lkda.report.draw.page import Section, page
from lkda.report.draw.tables import markdown_table
from lkda.report.draw.units import count, length, memory, quantity, three

HOSTILE = """"'><script>alert(1)</script><img src=x onerror=alert(2)>\u2028|</script>"""


class Elements(HTMLParser):
    """The elements with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(text)
    return parser.found


def chart(text: str) -> Chart:
    spec = {"data": {"values": [{"series": text}]}, "layer": []}
    return Chart("name", text, text, spec, (text,), (text,))


def section(text: str) -> Section:
    """One with this text in every place."""
    cells = [[text, text]]
    return Section(
        text, {text: text}, text, [text], [text, text], cells, 2, True, [0], cells, [text], {}, [chart(text)], [text]
    )


def test_text_stays_text_everywhere() -> None:
    written, plain = (elements(page(text, [section(text)])) for text in (HOSTILE, "plain"))
    assert [tag for tag, _ in written] == [tag for tag, _ in plain]
    assert [sorted(attributes) for _, attributes in written] == [sorted(attributes) for _, attributes in plain]
    cells = [attributes for tag, attributes in written if tag == "td"]
    assert [cell["data-order"] for cell in cells] == [HOSTILE, HOSTILE]


def test_a_cell_of_markdown_is_one_cell() -> None:
    lines = markdown_table(["a", "b"], [[HOSTILE, "two\nlines"]]).splitlines()
    assert len(lines) == 3
    assert lines[2].replace("\\|", "").count("|") == 3
    assert "<" not in lines[2]


@pytest.mark.parametrize(("write", "value"), [(count, 2.15e9), (memory, 8.06 * 2**20), (length, 65536), (three, 1042)])
def test_a_quantity_is_read_back(write, value) -> None:
    assert quantity(write(value)) == pytest.approx(value, rel=5e-3)
    assert quantity(f"{write(value)} (noisy)") == pytest.approx(value, rel=5e-3)
    assert quantity(f"{write(value)} tokens") is None


def test_columns_of_quantities_are_sorted_by_number() -> None:
    body = [["a", "12.6M", "8.06 MiB", "x"], ["b", "2.15G", "", "1"], ["c", "470k", "96 KiB", "2"]]
    written = elements(page("t", [Section(head=["name", "operations", "bytes", "mixed"], body=body, sortable=True)]))
    cells = [attributes.get("data-order") for tag, attributes in written if tag == "td"]
    lines = [cells[n : n + 4] for n in range(0, len(cells), 4)]
    assert sorted(lines, key=lambda line: float(line[1] or 0)) == [lines[2], lines[0], lines[1]]
    assert sorted(lines, key=lambda line: float(line[2] or 0)) == [lines[1], lines[2], lines[0]]
    assert [line[0] for line in lines] == [line[3] for line in lines] == [None] * 3
