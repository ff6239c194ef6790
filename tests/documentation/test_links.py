"""Links: each leads to a file and heading that exist; each page and each picture is linked."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.documentation.commands import ROOT

# Links, and images, outside code: [text](target), ![text](target).
_LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMITTED_REPORT = ROOT / "docs" / "results" / "tradeoff_h200" / "report.html"
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The committed pages that people read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(page: str) -> set[str]:
    """What `#` may name in a page: GitHub's form of each heading, numbered where headings repeat, and each id."""
    found: set[str] = set(re.findall(r'<a (?:id|name)="([^"]+)"', page))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", _FENCE.sub("", page), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        repeated = sum(bool(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other)) for other in found)
        found.add(f"{name}-{repeated}" if repeated else name)
    return found


def broken(page: Path, text: str) -> list[str]:
    """The targets of a page's links that lead nowhere. Addresses of the web are not asked."""
    found = []
    for target in _LINK.findall(_FENCE.sub("", text)):
        path, _, anchor = target.partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        there = (page.parent / path).resolve() if path else page
        found += [] if _leads(page, text, there, anchor) else [target]
    return found


def _leads(page: Path, text: str, there: Path, anchor: str) -> bool:
    if there == page:
        return anchor in anchors(text)
    if not there.exists() or not there.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(there.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken(page, text) == []
    reports = {(page.parent / path).resolve() for path in re.findall(r"\]\(([^)]*report\.html)\)", text)}
    assert reports <= {COMMITTED_REPORT}, "report.html is made by redraw, and only this one is committed"


def test_a_broken_link_is_found() -> None:
    text = "# One `two`: three\n\n## Same\n\n## Same\n\n"
    text += "[a](#one-two-three) [b](#same-1) [c](#same-2) [d](README.md#lkda)\n"
    assert broken(ROOT / "page.md", text) == ["#same-2"]
    assert broken(ROOT / "page.md", "[a](no_such.md) ![b](docs/no_such.png)\n```\n[c](code.md)\n```\n") == [
        "no_such.md",
        "docs/no_such.png",
    ]
    assert broken(ROOT / "page.md", "[a](../elsewhere)") == ["../elsewhere"]


def test_pages_named_in_code_and_comments_exist() -> None:
    folders = ("lkda", "configs", "scripts", "examples", "tests", "docs")
    files = [path for name in folders for path in sorted((ROOT / name).rglob("*")) if path != Path(__file__)]
    named = {
        (name, str(path.relative_to(ROOT)))
        for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
        if path.suffix in (".py", ".cu", ".cuh", ".yaml", ".md")
        for name in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert named
    assert [(name, path) for name, path in sorted(named) if not (ROOT / name).exists()] == []


def committed_files(*patterns: str) -> set[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {ROOT / name for name in listed.stdout.splitlines()}
    assert found
    return found


def test_one_report_is_committed() -> None:
    assert committed_files("docs/*.html") == {COMMITTED_REPORT}


def test_every_committed_picture_is_shown_by_a_page() -> None:
    """`redraw` draws all; committed are only those that somebody sees."""
    committed = committed_files("docs/*.png", "docs/*.svg")
    shown = {(page.parent / path).resolve() for page in pages() for path in _LINK.findall(page.read_text("utf-8"))}
    assert committed - shown == set()


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    beginning = [ROOT / "README.md"]
    while beginning:
        page = beginning.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        targets = [target.partition("#")[0] for target in _LINK.findall(page.read_text(encoding="utf-8"))]
        beginning += [(page.parent / path).resolve() for path in targets if path and "://" not in path]
    written_by_hand = {path for path in committed_files("*.md") if path.name != "table.md"}  # `redraw` makes those
    assert written_by_hand - reached == set()


def test_the_rewritten_sentences_are_those_of_their_pages() -> None:
    """docs/dev/plain_english.md has a page, a sentence before, and the sentence now in each row."""
    rows = [
        line.strip("| \n").split(" | ") for line in (ROOT / "docs/dev/plain_english.md").read_text("utf-8").split("\n")
    ]
    rows = [row for row in rows if len(row) == 3 and row[0].endswith(".md")]
    assert len(rows) > 40
    for page, _, now in rows:
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert now in text, (page, now)
