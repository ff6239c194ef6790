"""Makes the file of novels for scripts/prepare_data.py mix=english, from clones of two public repositories.

docs/guides/data.md has the commands.

A line is a JSON object {"author", "title", "year", "source", "text"}, with blank lines between the paragraphs. Novels
after 1930 are left out, and so is the ELTeC-eng copy of a novel that both repositories have.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lkda.checks import InputError
from lkda.io import replacing

LAST_YEAR = 1930
# Two authors of 100_english_novels have an initial before the surname, because there are others with that surname.
_SURNAMES = {"Cbronte": "Bronte", "Wcollins": "Collins"}
_TEI = "{http://www.tei-c.org/ns/1.0}"
_PARAGRAPHS = {f"{_TEI}{tag}" for tag in ("p", "head", "l", "trailer", "label")}


class Novel(NamedTuple):
    """A novel. `text` has blank lines between the paragraphs."""

    author: str
    title: str
    year: int
    source: str
    text: str


def plain_novels(repository: Path) -> Iterator[Novel]:
    """The novels of 100_english_novels: corpus/AUTHOR_WORD_YEAR.txt.

    Raises: InputError if there are none.
    """
    paths = sorted((repository / "corpus").glob("*_*_*.txt"))
    if not paths:
        raise InputError(f"{repository} has no corpus/AUTHOR_TITLE_YEAR.txt: give a clone of 100_english_novels.")
    for path in paths:
        author, title, year = path.stem.split("_")
        text = path.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
        paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
        joined = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        yield Novel(_SURNAMES.get(author, author), title, int(year), "100_english_novels", joined)


def marked_up_novels(repository: Path) -> Iterator[Novel]:
    """The novels of ELTeC-eng: level1/*.xml, without the markup.

    Raises: InputError if there are none, or for a file that is not XML.
    """
    paths = sorted((repository / "level1").glob("ENG*.xml"))
    if not paths:
        raise InputError(f"{repository} has no level1/ENG*.xml: give a clone of ELTeC-eng.")
    for path in paths:
        try:
            # The declaration must be the first thing in a file, but is not in some.
            root = ET.fromstring(path.read_text(encoding="utf-8").lstrip().encode())
        except ET.ParseError as error:
            raise InputError(f"{path} is not XML: {error}.") from error
        author, title = (root.findtext(f".//{_TEI}titleStmt/{_TEI}{tag}") or "" for tag in ("author", "title"))
        body = root.find(f".//{_TEI}body")
        year = re.search(r"ENG(\d{4})", path.name)
        if body is None or year is None:
            raise InputError(f"{path} has no body, or no year in its name: give a clone of ELTeC-eng.")
        text = "\n\n".join(paragraph for paragraph in _paragraphs(body) if paragraph)
        title = re.sub(r"\s*:\s*ELTeC edition\s*$", "", " ".join(title.split()))
        yield Novel(author.split(",")[0].split("(")[0].strip(), title, int(year[1]), "ELTeC-eng", text)


def _paragraphs(body: ET.Element) -> Iterator[str]:
    """The texts of the paragraphs, headings and lines of verse, in order."""
    for element in body:
        if element.tag in _PARAGRAPHS:
            yield " ".join("".join(element.itertext()).split())
        else:
            yield from _paragraphs(element)


def novels(plain: Path, marked_up: Path) -> list[Novel]:
    """The novels of both repositories up to LAST_YEAR, each once, ordered by author, title and year."""
    first = list(plain_novels(plain))
    known = {(novel.author.lower(), novel.title.lower()) for novel in first}
    second = [
        novel
        for novel in marked_up_novels(marked_up)
        if not any((novel.author.lower(), word) in known for word in re.findall(r"\w+", novel.title.lower()))
    ]
    return sorted(novel for novel in first + second if novel.year <= LAST_YEAR)


def write_novels(found: list[Novel], out: Path) -> None:
    """Write the novels as JSON lines, compressed with xz."""
    with replacing(out) as file, lzma.open(file, "wb") as lines:
        lines.writelines((json.dumps(novel._asdict(), ensure_ascii=False) + "\n").encode() for novel in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path, help="a clone of 100_english_novels")
    parser.add_argument("marked_up", type=Path, help="a clone of ELTeC-eng")
    parser.add_argument("out", type=Path, help="the file to write, ending in .jsonl.xz")
    given = parser.parse_args()
    if not given.out.name.endswith(".jsonl.xz"):
        raise InputError(f"the file must end in .jsonl.xz, got {given.out}.")
    found = novels(given.plain, given.marked_up)
    write_novels(found, given.out)
    size = sum(len(novel.text.encode()) for novel in found)
    print(f"{len(found)} novels of {len({novel.author for novel in found})} authors, {size / 1e6:.1f} MB: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
