"""Tokenizes a corpus once, into a cache directory named by the hash of everything that the tokens depend on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.fingerprint import Fingerprint, check_same, of_arrays, of_documents, of_tokenizer
from lkda.data.progress import patient_progress
from lkda.data.text.cache import building, metadata_of, publish
from lkda.data.text.documents import Splits, Text, Texts, blocks_of
from lkda.data.text.pieces import batches_of, encode_batch, pieces_of
from lkda.data.text.token_file import parts_of, positions_of, writing_token_file
from lkda.data.text.tokenizer import (
    decode_tokens,
    document_start,
    encode_texts,
    load_tokenizer,
    train_tokenizer,
    unknown_token,
    vocabulary_rows,
    word_splitter,
)

# Increase this when the content of a directory changes.
FORMAT = 3
# Characters of the training text that a tokenizer is trained on.
TRAINS_ON = 2**28


@dataclass(frozen=True)
class TokenizedCorpus:
    """The token files of a corpus. If the tokenizer has a `document_start`, every document begins with it.

    Attributes:
        directory: the directory of the files.
        train, validation: token ids [N], uint16 or uint32, memory-mapped.
        validation_bytes: UTF-8 bytes of the validation text.
        test, test_bytes: the same for the test split; None if there is none.
        fingerprint: of the documents and the tokenizer. For data=prose, of the token files and the tokenizer.
    """

    directory: Path
    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    fingerprint: Fingerprint
    test: np.ndarray | None = None
    test_bytes: int | None = None

    def split(self, name: str) -> tuple[np.ndarray, int]:
        """The tokens and the UTF-8 bytes of the split "validation" or "test", which must exist."""
        if name == "validation":
            return self.validation, self.validation_bytes
        assert name == "test"
        assert self.test is not None
        assert self.test_bytes is not None
        return self.test, self.test_bytes

    def starts(self, name: str) -> np.ndarray:
        """The positions where documents begin in the token file `name`: "train", "validation" or "test"."""
        start = document_start(self.tokenizer)
        if start is None:
            return np.load(_starts_file(self.directory / f"{name}.npy"))
        token_ids = self.train if name == "train" else self.split(name)[0]
        return positions_of(token_ids, start)


def unigram_entropy(token_ids: np.ndarray) -> float:
    """The unigram entropy of tokens, in nats per token: the loss of the best model that ignores the context."""
    return unigram_entropy_of([token_ids])


def unigram_entropy_of(arrays: Sequence[np.ndarray]) -> float:
    """The unigram entropy of the tokens of all arrays together."""
    counts = np.zeros(1, dtype=np.int64)
    for part in (part for token_ids in arrays for part in parts_of(token_ids)):
        found = np.bincount(part, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    share = counts / counts.sum()
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def bytes_of(token_ids: np.ndarray, tokenizer: Tokenizer) -> int:
    """The UTF-8 bytes of the text of tokens. A token that begins a document has none."""
    text, start = 0, document_start(tokenizer)
    for part in parts_of(token_ids):
        tokens = part if start is None else part[part != start]
        text += len(decode_tokens(tokenizer, tokens.tolist()).encode())
    return text


class Corpus(Protocol):
    """A corpus that can be tokenized."""

    @property
    def name(self) -> str:
        """The name of the corpus in messages."""

    def fingerprint(self) -> str:
        """A hash that changes with any of the documents, and with how they are split."""

    def documents(self, scratch: Path, progress: Progress) -> Splits:
        """The split documents. `scratch`, an empty directory, must exist while they are read."""


def tokenize_corpus(
    sources: Corpus,
    *,
    vocab_size: int,
    tokenizer_path: Path | None,
    cache_dir: Path,
    expected: Fingerprint = MappingProxyType({}),
) -> TokenizedCorpus:
    """The tokenized corpus, which is read from the cache, or built there first.

    If several processes need the same corpus, one of them builds it and the others wait.

    Args:
        sources: the corpus.
        vocab_size: of the tokenizer to train, if `tokenizer_path` is None.
        tokenizer_path: a tokenizer.json to use.
        cache_dir: the directory of the cache.
        expected: the fingerprint of the run that is resumed. Other documents are rejected before they are tokenized.
    Raises: InputError for a corpus or a tokenizer that cannot be read, a corpus that is not the expected one, or a
        cache that cannot be written.
    """
    given = load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    if given is not None and expected:
        check_same(expected, {"tokenizer": of_tokenizer(given)}, source=str(tokenizer_path))
    with_tokenizer = str(vocab_size) if given is None else given.to_str()
    key = hashlib.sha256(f"{FORMAT} {sources.fingerprint()} {with_tokenizer}".encode()).hexdigest()[:32]
    entry = cache_dir / "corpora" / key
    if metadata_of(entry) is None:
        with building(entry) as scratch:
            if metadata_of(entry) is None:
                built = scratch / "entry"
                built.mkdir()
                publish(built, entry, _build(built, scratch / "arrow", sources, given, vocab_size, expected))
    return load_tokenized(entry)


def tokenize_into(directory: Path, sources: Corpus, *, vocab_size: int, tokenizer_path: Path | None) -> TokenizedCorpus:
    """Tokenize a corpus into `directory`, which is created atomically, outside the cache.

    Args:
        sources, vocab_size, tokenizer_path: as of `tokenize_corpus`.
    Raises: InputError as `tokenize_corpus`, and if the directory exists already.
    """
    given = load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    if directory.exists():
        raise InputError(f"{directory} exists already: give another out, or remove it.")
    with building(directory) as scratch:
        built = scratch / "entry"
        built.mkdir()
        publish(built, directory, _build(built, scratch / "arrow", sources, given, vocab_size, {}))
    return load_tokenized(directory)


def _build(
    directory: Path,
    arrow: Path,
    sources: Corpus,
    given: Tokenizer | None,
    vocab_size: int,
    expected: Fingerprint,
) -> dict[str, Any]:
    """Fill `directory`, with `arrow` as scratch space for `datasets`. Returns the metadata to store with the files."""
    with patient_progress() as progress:
        splits = sources.documents(arrow, progress)
        parts = {"train": splits.train, "validation": splits.validation}
        parts |= {"test": splits.test} if splits.test else {}
        digests = {name: of_documents(map(blocks_of, documents)) for name, documents in parts.items()}
        check_same(expected, digests, source=sources.name)
        metadata = tokenize_splits(splits, directory, given=given, vocab_size=vocab_size, progress=progress)
    return {**metadata, "sha256": digests}


def tokenize_splits(
    splits: Splits,
    directory: Path,
    *,
    given: Tokenizer | None,
    vocab_size: int,
    progress: Progress,
) -> dict[str, int]:
    """Fill `directory` with tokenizer.json, train.npy, validation.npy and, if there is a test split, test.npy. Returns
    the metadata to publish with them.

    If the tokenizer has no token that begins a document, the positions where documents begin are written to
    train_starts.npy and so on. The documents are iterated several times. Only a part of them and of their tokens is in
    memory at a time.

    Args:
        given: the tokenizer. None means to train one of `vocab_size` tokens on the training documents.
    """
    tokenizer = given
    if tokenizer is None:
        tokenizer = train_on(
            splits.train, vocab_size=vocab_size, size=size_of(splits.train, progress), progress=progress
        )
    else:
        _check_alphabet(tokenizer, chain(splits.train, splits.validation, splits.test))
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_token_file(directory / "train.npy", tokenizer, splits.train, progress)
    held_out = {"validation": splits.validation} | ({"test": splits.test} if splits.test else {})
    return {
        f"{name}_bytes": write_token_file(directory / f"{name}.npy", tokenizer, documents, progress)
        for name, documents in held_out.items()
    }


def size_of(documents: Iterable[Text], progress: Progress) -> int:
    """The number of characters of documents."""
    task = progress.add_task("measuring the training text", total=None)
    size = sum(len(block) for document in documents for block in blocks_of(document))
    progress.remove_task(task)
    return size


def train_on(documents: Iterable[Text], *, vocab_size: int, size: int, progress: Progress) -> Tokenizer:
    """Train a tokenizer on documents. If they are longer than TRAINS_ON, it is trained on pieces of them at equal
    distances, because the memory that it needs grows with the number of different words.

    Args:
        size: the number of characters of the documents, or more.
    """
    share = min(1.0, TRAINS_ON / max(1, size))
    task = progress.add_task(f"training a tokenizer of {vocab_size} tokens", total=int(size * share))

    def chosen() -> Iterator[str]:
        pieces = (piece for document in documents for piece in pieces_of(document, word_splitter()))
        for number, piece in enumerate(pieces):
            if int((number + 1) * share) > int(number * share):
                progress.advance(task, len(piece))
                yield piece

    tokenizer = train_tokenizer(chosen(), vocab_size)
    progress.remove_task(task)
    return tokenizer


def write_token_file(path: Path, tokenizer: Tokenizer, documents: Texts, progress: Progress) -> int:
    """Write the tokens, and the beginnings of documents if no token marks them. Returns the documents' UTF-8 bytes."""
    task = progress.add_task(f"tokenizing {path.stem}", total=len(documents))
    dtype = np.dtype(np.uint16 if vocabulary_rows(tokenizer) <= 2**16 else np.uint32)
    unknown = unknown_token(tokenizer)
    begun = count = size = 0
    starts = array("q")
    with writing_token_file(path, dtype) as write:
        for batch in batches_of(documents, tokenizer):
            tokens, begins = encode_batch(tokenizer, batch, unknown=unknown, dtype=dtype)
            write(tokens)
            starts.extend(count + place for place in begins)
            begun += len(begins)
            count += len(tokens)
            size += sum(len(piece.encode()) for _, piece in batch)
            description = f"tokenizing {path.stem}: {begun:,} documents, {count:,} tokens"
            progress.update(task, completed=begun, description=description)
    if document_start(tokenizer) is None:
        places = np.unique(np.frombuffer(starts, dtype=np.int64))
        np.save(_starts_file(path), places[places < count])  # a document without tokens begins where the next one does
    return size


def _starts_file(token_file: Path) -> Path:
    return token_file.with_name(f"{token_file.stem}_starts.npy")


def _check_alphabet(tokenizer: Tokenizer, documents: Iterable[Text]) -> None:
    """Raises InputError for a character that a given tokenizer would drop silently."""
    characters: set[str] = set()
    for document in documents:
        for block in blocks_of(document):
            characters.update(block)
    visible = [character for character in sorted(characters) if not character.isspace()]
    try:
        encodings = encode_texts(tokenizer, visible)
    except Exception as error:  # the library's own has no other type
        raise InputError(
            f"the tokenizer of data.tokenizer_path cannot encode the text ({error}); give one that knows every byte."
        ) from error
    for character, encoding in zip(visible, encodings, strict=True):
        if not encoding.ids:
            raise InputError(
                f"the tokenizer of data.tokenizer_path has no token for {character!r}, which is in the text; "
                "give a tokenizer that has every byte, or leave data.tokenizer_path out."
            )


def load_tokenized(directory: Path, *, mix: str | None = None) -> TokenizedCorpus:
    """Load the token files of a published directory, memory-mapped.

    Args:
        mix: the mix that scripts/prepare_data.py makes there, for the message. None means that it is not known.
    Raises: InputError if there is no such directory, or if a file in it has another size than when it was written.
    """
    metadata = metadata_of(directory)
    if metadata is None:
        raise InputError(f"{directory} holds no complete tokenized corpus: make it with {_command(mix)}.")
    names = ("train", "validation", *(["test"] if "test_bytes" in metadata else []))
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    texts = metadata.get("sha256") or {name: of_arrays(array) for name, array in arrays.items()}
    return TokenizedCorpus(
        directory,
        tokenizer,
        arrays["train"],
        arrays["validation"],
        metadata["validation_bytes"],
        {**texts, "tokenizer": of_tokenizer(tokenizer)},
        arrays.get("test"),
        metadata.get("test_bytes"),
    )


def without_test(directory: Path, mix: str | None = None) -> str:
    """The reason why a corpus of an earlier version has no test split, in words."""
    return f"{directory} was made by an earlier version; make it again with python {_command(mix)}"


def _command(mix: str | None) -> str:
    """The command that prepares a mix."""
    return "scripts/prepare_data.py" if mix in (None, "prose") else f"scripts/prepare_data.py mix={mix}"
