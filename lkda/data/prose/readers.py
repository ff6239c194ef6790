"""Reads the documents of a file in a package, one function for each kind of file."""

from __future__ import annotations

import ast
import gzip
import json
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, NamedTuple

from lkda.checks import InputError

# A line of prose has at least this many characters, and at least this fraction of them are letters and spaces.
_SHORTEST_PROSE, _PROSE_SHARE = 60, 0.85


class Document(NamedTuple):
    """A text.

    Attributes:
        name: its name within the file. "" if it is the only one.
        group: documents of one group, such as the novels of an author, are in the same split. "" for none.
    """

    text: str
    name: str = ""
    group: str = ""


def text_of(path: Path) -> list[Document]:
    """A text file, which may be gzipped."""
    return [Document(_content(path))]


def page_of(path: Path) -> list[Document]:
    """The text of an HTML page, one paragraph per line."""
    return [Document(_text_of_html(_content(path)))]


def prose_page_of(path: Path) -> list[Document]:
    """The lines of prose of an HTML page, without navigation, tables and listings. See `is_prose`."""
    return [Document(_prose_in(_text_of_html(_content(path))))]


def summaries_of(path: Path) -> list[Document]:
    """The extracts in a JSON table of articles, in order."""
    articles = json.loads(path.read_text(encoding="utf-8"))
    return [Document(article["extract"], str(name)) for name, article in articles.items()]


def longest_string_of(path: Path) -> list[Document]:
    """The longest string literal of a Python module. The module is parsed but not run."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    literals = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [Document(max(literals, key=len))]


def licence_of(path: Path) -> list[Document]:
    """The text of a licence of scancode-toolkit, without the YAML lines before it."""
    return [Document(re.sub(r"\A---\n.*?\n---\n", "", _content(path), flags=re.DOTALL).strip())]


def service_of(path: Path) -> list[Document]:
    """The documentation in the JSON description of a web service: the lines of prose."""
    pages = (_prose_in(_text_of_html(html)) for html in _documentation_in(json.loads(_content(path))))
    return [Document("\n".join(page for page in pages if page))]


def c_files_of(path: Path) -> Iterator[Document]:
    """The .c files in a tar archive, in the order of the archive."""
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".c"):
                content = archive.extractfile(member)
                assert content is not None, "it is a file"
                yield Document(content.read().decode("utf-8", errors="replace"), member.name)


def rows_of(path: Path) -> Iterator[Document]:
    """The rows of a file of JSON lines {"text", "author", "title"}, which may end in .gz or .xz. An author is a group.
    Empty lines are no rows.

    Raises: InputError for a line that is not an object with a text.
    """
    opened: Callable[..., IO[str]] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)  # type: ignore[assignment]
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise InputError(
                        f'{path} must have a JSON object with a "text" in each line; line {number} has none.'
                    )
                row["text"].encode()
                author, title = (str(row.get(name, "")) for name in ("author", "title"))
                yield Document(row["text"], f"{author}: {title}" if author or title else str(number), author)
    except json.JSONDecodeError as error:
        where = f"line {number} is no JSON ({error.msg} at its character {error.colno})"
        raise InputError(f"{path} cannot be read as JSON lines: {where}.") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{path} cannot be read as JSON lines: line {number} is no UTF-8 ({error}).") from error
    except (OSError, EOFError, lzma.LZMAError, UnicodeError) as error:
        raise InputError(f"{path} cannot be read as JSON lines, after line {number}: {error}.") from error


def _content(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")


def is_prose(line: str) -> bool:
    """Whether a line is a paragraph of text: at least 60 characters, at least 85% of them letters and spaces."""
    letters = sum(character.isalpha() or character == " " for character in line)
    return len(line) >= _SHORTEST_PROSE and letters >= _PROSE_SHARE * len(line)


def _prose_in(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if is_prose(line))


def _documentation_in(node: Any) -> Iterator[str]:
    """The values of "documentation" in nested JSON, in order."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation_in(value)


_BLOCKS = {"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "blockquote", "title"}
_HIDDEN = {"script", "style"}


def _text_of_html(html: str) -> str:
    page = _Page()
    page.feed(html)
    lines = (" ".join(line.split()) for line in "".join(page.text).split("\n"))
    return "\n".join(line for line in lines if line)


class _Page(HTMLParser):
    """Collects the text of a page without its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in _HIDDEN
        if tag in _BLOCKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _HIDDEN
        if tag in _BLOCKS:
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data.replace("\n", " "))
