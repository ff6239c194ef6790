"""Text from any data set that `datasets` can load, on the Hugging Face hub or in a local directory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from lkda.checks import InputError, check_count
from lkda.data.progress import without_bars_of_datasets
from lkda.data.text.cache import expanded
from lkda.data.text.datamodule import TextDataModule
from lkda.data.text.documents import Documents, Splits
from lkda.data.text.files import text_column_of
from lkda.data.text.table import kind_of_value

HUB_SECONDS = 10  # time limit of a request to the hub
_STREAMED = "text"  # the column name in the file of a stream
_DOCUMENTS_PER_UPDATE = 100  # documents of a stream between two updates of the progress bar

# Paths or globs within a data set: one list for all splits, or one list for each split by name.
DataFiles = list[str] | dict[str, list[str]]


@dataclass(frozen=True)
class HubCorpus:
    """A data set, and which of its documents are used.

    Attributes:
        name: the name on the hub, or a local directory.
        subset: the configuration of the data set, if it has several.
        data_files: the files to load. None means those that `datasets` finds.
        revision: a branch, tag or commit. "" means the newest, or a local directory.
        split, val_split: splits of the data set. If val_split is None, the fraction val_fraction of `split`, at regular
            intervals, is used for validation.
        test_split: a split of the data set. If None, the fraction test_fraction of the documents that are left is used,
            at regular intervals. A fraction of 0 means no test split.
        text_column: the column that holds the text.
        max_documents: use only the first documents of each split, up to this number. None means all.
        streaming: download only the documents that are used. They are written to a file first, and read from it.
    """

    name: str
    subset: str | None
    data_files: DataFiles | None
    revision: str
    split: str
    val_split: str | None
    val_fraction: float
    text_column: str
    max_documents: int | None
    streaming: bool
    test_split: str | None = None
    test_fraction: float = 0.0

    def fingerprint(self) -> str:
        """A hash of the revision's commit, not of the documents, so that a cached corpus is found without a
        download."""
        words = {name: value for name, value in asdict(self).items() if name != "streaming"}
        if self.test_split is None and not self.test_fraction:  # so that the cache of an earlier version is found
            del words["test_split"], words["test_fraction"]
        digest = hashlib.sha256(repr(sorted(words.items())).encode())
        folder = Path(self.name)
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} ".encode())
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def documents(self, scratch: Path, progress: Progress) -> Splits:
        """Load and split the documents.

        Raises: InputError for a split or a column that does not exist, or a split without text.
        """
        train = self._split(self.split, scratch / "train", progress)
        if self.val_split is not None:
            validation = self._split(self.val_split, scratch / "validation", progress)
        else:
            count = len(train)
            train, validation = _every_so_many(train, self.val_fraction)
            if not validation:
                raise InputError(
                    f"{count} documents are too few to hold out the fraction {self.val_fraction}: give a larger "
                    "data.val_fraction, or data.val_split."
                )
        if self.test_split is not None:
            return Splits(train, validation, self._split(self.test_split, scratch / "test", progress))
        if not self.test_fraction:
            return Splits(train, validation)
        train, test = _every_so_many(train, self.test_fraction)
        return Splits(train, validation, test)

    def _split(self, split: str, scratch: Path, progress: Progress) -> Documents:
        import datasets

        reading = progress.add_task(f"reading {split}", total=None)
        options: dict[str, Any] = {"split": split, "streaming": self.streaming, "revision": self.revision or None}
        options["data_files"] = self.data_files
        local = Path(self.name).is_dir()
        if local:  # `datasets` distinguishes versions of a file only by size and time
            options["cache_dir"] = str(scratch)
        downloads = progress.console.is_terminal and not local  # these show how far they are
        try:
            with nullcontext() if downloads else without_bars_of_datasets():
                found = datasets.load_dataset(self.name, self.subset, **options)
        except StopIteration as error:  # of a file without a row
            raise InputError(f"split {split!r} of {self.name} holds no row.") from error
        except Exception as error:  # a loader may raise any type
            reason = " ".join(str(error).split())
            raise InputError(f"data.name={self.name} cannot be loaded: {type(error).__name__}: {reason}") from error
        if self.streaming:
            rows = _counted(islice(found, self.max_documents), f"reading {split}", reading, progress)
            found = _written_down(rows, self.text_column, scratch)
            column = _STREAMED
        else:
            column = text_column_of(found, self.text_column, self.name)
            if self.max_documents is not None:
                found = found.select(range(min(self.max_documents, len(found))))
        documents = Documents(found, column)
        progress.remove_task(reading)
        if not documents:
            raise InputError(f"split {split!r} of {self.name} holds no text in column {self.text_column!r}.")
        return documents


def _every_so_many(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    """Split documents in two: those that stay, and those held out. One of every 1 / fraction documents is held out,
    beginning in the middle of the first such group."""
    every = max(2, round(1 / fraction))
    held_out = np.arange(every // 2, len(documents), every)
    return documents.some(np.delete(np.arange(len(documents)), held_out)), documents.some(held_out)


def _counted(rows: Iterable[Any], doing: str, task: TaskID, progress: Progress) -> Iterator[Any]:
    """Yield the rows, and show their number in the progress bar."""
    for count, row in enumerate(rows, start=1):
        yield row
        if count % _DOCUMENTS_PER_UPDATE == 0:
            progress.update(task, description=f"{doing}: {count:,} documents")


def _written_down(rows: Iterable[Any], column: str, scratch: Path) -> Any:
    """Write the documents of a stream to a file. Returns a `datasets.Dataset` of the file.

    Batches are made from this file and not from the stream, because resuming a shuffled stream loses examples.
    """
    import datasets

    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            if column not in row:
                raise InputError(
                    f"there is no column {column!r}; the columns are {', '.join(row)}. Set data.text_column."
                )
            text = row[column]
            if not isinstance(text, str | None):
                raise InputError(f"column {column!r} holds {kind_of_value(text)}, not text. Set data.text_column.")
            file.write(json.dumps({_STREAMED: text or ""}) + "\n")
    with without_bars_of_datasets():
        return datasets.Dataset.from_json(str(path), cache_dir=str(scratch))


class HubDataModule(TextDataModule):
    """Packed batches of the documents of a data set on the hub. It uses the same cache as files; see `TextDataModule`.

    Args:
        name: on the hub ("roneneldan/TinyStories"), or a local directory that `datasets` can load.
        data_files: paths or globs within the data set: one, a list, or one for each split, as in
            {"train": "a/*.parquet"}.
        subset, revision, split, val_split, val_fraction, test_split, test_fraction, text_column, max_documents,
            streaming: see `HubCorpus`.
        context, batch_size, vocab_size, seed, tokenizer_path, cache_dir, max_val_batches, num_workers, pin_memory: see
            `TextDataModule`.
    """

    sources = ("hub",)

    def __init__(
        self,
        *,
        name: str,
        context: int,
        batch_size: int,
        subset: str | None = None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
        revision: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_fraction: float = 0.01,
        test_split: str | None = None,
        test_fraction: float = 0.01,
        text_column: str = "text",
        max_documents: int | None = None,
        streaming: bool = False,
        vocab_size: int = 4096,
        seed: int = 0,
        tokenizer_path: str | None = None,
        cache_dir: str | None = None,
        max_val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            source="hub",
            context=context,
            batch_size=batch_size,
            vocab_size=vocab_size,
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            text_column=text_column,
            tokenizer_path=tokenizer_path,
            cache_dir=cache_dir,
            max_val_batches=max_val_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        if val_split is None and not 0 < val_fraction <= 0.5:
            raise InputError(f"data.val_fraction must be above 0 and at most 0.5, got {val_fraction}.")
        if val_split == split:
            raise InputError(
                f"data.val_split={val_split} is also data.split, the training split: give another one, or leave it out."
            )
        if test_split is None and not 0 <= test_fraction <= 0.5:
            raise InputError(f"data.test_fraction must be in [0, 0.5] (0: no test split), got {test_fraction}.")
        same = [name for name, other in (("split", split), ("val_split", val_split)) if other == test_split]
        if test_split is not None and same:
            raise InputError(f"data.test_split={test_split} is also data.{same[0]}: give another split for the test.")
        if max_documents is not None:
            check_count("data.max_documents", max_documents, least=2)
        home = expanded(name)
        if name.startswith(("~", "/", ".")) and not home.is_dir():
            raise InputError(f"data.name={name} must be a directory, but there is none.")
        if home.is_dir() and revision is not None:
            raise InputError(
                f"data.revision is for data sets on the hub, but data.name={name} is a directory: leave it out."
            )
        self.source = str(home) if home.is_dir() else name
        self.subset, self.revision, self.split, self.val_split = subset, revision, split, val_split
        self.test_split = test_split
        self.max_documents, self.streaming = max_documents, streaming
        self.data_files = None if data_files is None else files_of(data_files)

    def _corpus(self) -> HubCorpus:
        return HubCorpus(
            name=self.source,
            subset=self.subset,
            data_files=self.data_files,
            revision=commit_of(self.source, self.revision),
            split=self.split,
            val_split=self.val_split,
            val_fraction=self.val_fraction,
            test_split=self.test_split,
            test_fraction=self.test_fraction,
            text_column=self.text_column,
            max_documents=self.max_documents,
            streaming=self.streaming,
        )


def files_of(data_files: object) -> DataFiles:
    """`data.data_files` in the form that `datasets` takes. Raises InputError unless it holds paths within a data
    set."""
    if isinstance(data_files, Mapping):
        return {str(split): _patterns(patterns) for split, patterns in data_files.items()}
    return _patterns(data_files)


def _patterns(given: object) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise InputError(
            f"data.data_files must be paths or globs, [a.parquet] or {{train: [a.parquet]}}, got {given!r}."
        )
    for pattern in patterns:
        # The name of the cache entry depends only on the content of the data set.
        if pattern.startswith(("/", "~")) or "://" in pattern or ".." in Path(pattern).parts:
            raise InputError(
                f"data.data_files={pattern} must be a path within data.name; for other files use data=files."
            )
    return patterns


def commit_of(name: str, revision: str | None) -> str:
    """The commit of a data set on the hub. It is "" for a local directory, and `revision` if HF_HUB_OFFLINE is set.

    The hub is asked here with a time limit, because `datasets` takes half a minute to find out that there is no
    network.

    Raises: InputError if there is no such data set, or if the hub cannot be reached.
    """
    if Path(name).is_dir():
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return revision or ""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=HUB_SECONDS).sha)
    except HfHubHTTPError as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(
            f"the hub has no data set {name!r}{at} that you can read: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # a connection error, whose class depends on the hub's client
        raise InputError(
            f"data.name={name} is not a local directory, and the Hugging Face hub cannot be reached ({error}). Use "
            "data=files for your own files, or set HF_HUB_OFFLINE=1 if the data set was downloaded before."
        ) from error
