"""A corpus tokenised once: a directory of the cache, named by the hash of everything it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from lkda.data.corpus import Sources, read_documents
from lkda.data.tokenizer import document_start, load_tokenizer, train_tokenizer

# Raise it when what a directory holds changes.
FORMAT = 1
_DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True)
class Prepared:
    """Token streams, every document beginning with END_OF_TEXT.

    Attributes:
        train, validation: uint16 or uint32, memory-mapped.
        validation_bytes: UTF-8 bytes of the validation text.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int

    def unigram_entropy(self) -> float:
        """Of the validation tokens, in nats a token: the loss of the best model that ignores the context."""
        share = np.bincount(self.validation) / len(self.validation)
        share = share[share > 0]
        return float(-(share * np.log(share)).sum())


def default_cache_dir() -> Path:
    """LKDA_CACHE, or ~/.cache/lkda."""
    return Path(os.environ.get("LKDA_CACHE") or Path.home() / ".cache" / "lkda")


def prepare_corpus(sources: Sources, *, vocab_size: int, tokenizer_path: Path | None, cache_dir: Path) -> Prepared:
    """The tokenised corpus, from the cache or built into it.

    Two processes may build the same at once: each works in a directory of its own, and the first to finish gives it its
    name. Raises ValueError for a corpus or a tokenizer that cannot be read.
    """
    given = load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    with_tokenizer = str(vocab_size) if given is None else given.to_str()
    key = hashlib.sha256(f"{FORMAT} {sources.fingerprint()} {with_tokenizer}".encode()).hexdigest()[:32]
    directory = cache_dir / "corpora" / key
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
        except OSError as error:
            raise ValueError(f"cannot write the cache {directory.parent}: {error.strerror}. Set LKDA_CACHE.") from error
        try:
            _build(building, sources, given, vocab_size, cache_dir)
            os.rename(building, directory)
        except OSError:
            if not directory.is_dir():  # else another process was first, with the same content
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _load(directory)


def _build(directory: Path, sources: Sources, given: Tokenizer | None, vocab_size: int, cache_dir: Path) -> None:
    console = Console(stderr=True)
    with console.status("reading the corpus"):
        train, validation = read_documents(sources, cache_dir / "datasets")
    tokenizer = given
    if tokenizer is None:
        with console.status(f"training a tokenizer of {vocab_size} tokens"):
            tokenizer = train_tokenizer(train, vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    with Progress(console=console, transient=True) as progress:
        for name, documents in (("train", train), ("validation", validation)):
            pieces = progress.track(_pieces(documents), description=f"tokenising {name}", total=_count(documents))
            np.save(directory / f"{name}.npy", _encode(tokenizer, pieces))
    facts = {"validation_bytes": sum(len(text.encode()) for text in validation)}
    (directory / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _count(documents: Sequence[str]) -> int:
    return math.ceil(len(documents) / _DOCUMENTS_AT_ONCE)


def _pieces(documents: Sequence[str]) -> Iterable[Sequence[str]]:
    return (documents[n : n + _DOCUMENTS_AT_ONCE] for n in range(0, len(documents), _DOCUMENTS_AT_ONCE))


def _encode(tokenizer: Tokenizer, pieces: Iterable[Sequence[str]]) -> np.ndarray:
    """One stream, END_OF_TEXT before every document."""
    start = document_start(tokenizer)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    parts = []
    for piece in pieces:
        for encoding in tokenizer.encode_batch(list(piece), add_special_tokens=False):
            parts.append(np.array([start, *encoding.ids], dtype=dtype))
    return np.concatenate(parts)


def _load(directory: Path) -> Prepared:
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    train, validation = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("train", "validation"))
    return Prepared(load_tokenizer(directory / "tokenizer.json"), train, validation, facts["validation_bytes"])
