"""The DataModule of text that was tokenized before, from one source or from several that are mixed by weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.fingerprint import of_tokenizer
from lkda.data.packing import JoinedRows, Rows, RowSource
from lkda.data.shuffle import shares
from lkda.data.text.cache import expanded
from lkda.data.text.packed import HeldOut, PackedDataModule, PackedText
from lkda.data.text.token_file import parts_of, positions_of
from lkda.data.text.token_shards import DTYPES, Shard, check_tokens, hash_of_files, load_shard, shard_paths
from lkda.data.text.tokenize import bytes_of, unigram_entropy_of
from lkda.data.text.tokenizer import document_start, load_tokenizer, vocabulary_rows

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class _Source:
    """The token files of one entry of data.paths."""

    train: list[Shard]
    validation: list[Shard]
    test: list[Shard]


class TokensDataModule(PackedDataModule):
    """Packed batches of token files {tokens, targets, cu_seqlens}; see `lkda.data.packing`.

    A document begins where the tokenizer's `document_start` token is, and at the beginning of each file.

    Args:
        paths: for each source a token file, a glob of token files, or a directory. A directory of
            scripts/prepare_data.py also brings its validation, its test and its tokenizer. Of another directory all
            token files are for training.
        weights: of the sources: the fraction of the training rows that come from each. None means that every token is
            used once in an epoch.
        val_paths, test_paths: token files of the two splits. If empty, the splits are those of prepared directories,
            or, if there is none, fractions at the end of the last file: first the test, then the validation.
        val_fraction, test_fraction: of all tokens. A test_fraction of 0 means no test split.
        tokenizer_path: the tokenizer.json of the tokens. None means that of a prepared directory.
        dtype: of the numbers in .bin files without a header. A type that is too narrow is an error.
        context, batch_size, seed, max_val_batches, num_workers, pin_memory: see `PackedDataModule`.
    """

    def __init__(
        self,
        *,
        paths: Sequence[str],
        context: int,
        batch_size: int,
        weights: Sequence[float] | None = None,
        val_paths: Sequence[str] = (),
        test_paths: Sequence[str] = (),
        val_fraction: float = 0.01,
        test_fraction: float = 0.01,
        tokenizer_path: str | None = None,
        dtype: str = "uint16",
        seed: int = 0,
        max_val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            source="tokens",
            context=context,
            batch_size=batch_size,
            seed=seed,
            max_val_batches=max_val_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        if any(isinstance(given, str) for given in (paths, val_paths, test_paths)):
            raise InputError("data.paths, data.val_paths and data.test_paths must be lists: write [a.npy] for one.")
        if not paths:
            raise InputError("data.paths is empty: give token files or directories, as in data.paths=[train.npy].")
        if dtype not in DTYPES:
            raise InputError(f"data.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 or val_fraction + test_fraction >= 1:
            raise InputError(
                "data.val_fraction must be above 0 and data.test_fraction 0 or more, with a sum below 1; got "
                f"{val_fraction} and {test_fraction}."
            )
        if weights is not None and len(weights) != len(paths):
            raise InputError(
                f"data.weights must have one entry for each of data.paths, which has {len(paths)}; got {len(weights)}."
            )
        if weights is not None:
            shares(weights)  # raises for weights that cannot be used
        self.paths, self.val_paths, self.test_paths = paths, val_paths, test_paths
        self.weights, self.dtype = weights, dtype
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.tokenizer_path = tokenizer_path

    def _read(self) -> PackedText:
        sources = [self._source(path) for path in self.paths]
        given = {name: self._load(getattr(self, f"{name}_paths"), name) for name in ("val", "test")}
        validation = given["val"] or [shard for source in sources for shard in source.validation]
        test = given["test"] or [shard for source in sources for shard in source.test]
        _check_apart([shard for source in sources for shard in source.train], validation, test)
        tokenizer = self._tokenizer()
        rows = vocabulary_rows(tokenizer)
        for shard in [*(shard for source in sources for shard in source.train), *validation, *test]:
            check_tokens(shard, rows=rows)
        hashes = {"train": hash_of_files([shard for source in sources for shard in source.train])}
        if not validation:
            sources, validation, test = self._cut(sources, test)
        hashes |= {
            name: _hash_of_arrays(shards) for name, shards in {"validation": validation, "test": test}.items() if shards
        }
        parts = [self._rows(source.train, tokenizer, partial=False) for source in sources]
        self._check_sizes(parts, validation)
        no_test = self._why_no_test(test)
        return PackedText(
            tokenizer=tokenizer,
            fingerprint={
                "train": hashlib.sha256(f"{hashes} {self.weights}".encode()).hexdigest(),
                "validation": hashes["validation"],
                **({"test": hashes["test"]} if no_test is None else {}),
                "tokenizer": of_tokenizer(tokenizer),
            },
            train=JoinedRows(parts),
            train_tokens=sum(len(shard.token_ids) for source in sources for shard in source.train),
            validation=self._held_out(validation, tokenizer),
            test=self._held_out(test, tokenizer) if no_test is None else None,
            no_test=no_test,
            left_out=self._left_out([shard for source in sources for shard in source.train], parts),
            parts=None if self.weights is None else [(p.count, w) for p, w in zip(parts, self.weights)],
        )

    def _source(self, path: str) -> _Source:
        home = expanded(path)
        if not (home / "train.npy").is_file():
            return _Source(self._load([path], "paths"), [], [])
        train, validation, test = (
            [load_shard(home / f"{name}.npy", dtype=self.dtype)] if (home / f"{name}.npy").is_file() else []
            for name in ("train", "validation", "test")
        )
        return _Source(train, validation, test)

    def _load(self, patterns: Sequence[str], name: str) -> list[Shard]:
        option = "data.paths" if name == "paths" else f"data.{name}_paths"
        return [load_shard(path, dtype=self.dtype) for path in shard_paths(patterns, option=option)]

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens. Raises InputError if there is none, or if the directories have different
        ones."""
        if self.tokenizer_path is not None:
            chosen = load_tokenizer(expanded(self.tokenizer_path))
        homes = [home for path in self.paths if (home := expanded(path) / TOKENIZER).is_file()]
        if self.tokenizer_path is None and not homes:
            raise InputError("data.tokenizer_path is missing: give the tokenizer.json with which the tokens were made.")
        found = [load_tokenizer(home) for home in homes]
        chosen = chosen if self.tokenizer_path is not None else found[0]
        for home, own in zip(homes, found):
            if of_tokenizer(own) != of_tokenizer(chosen):
                raise InputError(
                    f"{home} is another tokenizer than {self.tokenizer_path or homes[0]}, so these tokens cannot be "
                    "mixed: prepare one with tokenizer_path= that of the other."
                )
        return chosen

    def _cut(self, sources: list[_Source], test: list[Shard]) -> tuple[list[_Source], list[Shard], list[Shard]]:
        """Hold out the end of the last file: the validation, and before it the test, if no test split is given."""
        *before, last = sources[-1].train
        total = sum(len(shard.token_ids) for source in sources for shard in source.train)
        count = math.ceil(self.val_fraction * total)
        test_count = 0 if test else math.ceil(self.test_fraction * total)
        end = len(last.token_ids) - count
        begin = end - test_count
        if begin <= 0:
            raise InputError(
                f"{last.path} has {len(last.token_ids)} tokens, too few to hold out {count + test_count} at its end: "
                "give data.val_paths."
            )
        validation = [Shard(last.path, last.token_ids[end:])]
        test = test or ([Shard(last.path, last.token_ids[begin:end])] if test_count else [])
        train = [*before, Shard(last.path, last.token_ids[:begin])]
        return [*sources[:-1], _Source(train, [], [])], validation, test

    def _rows(self, shards: Sequence[Shard], tokenizer: Tokenizer, *, partial: bool) -> JoinedRows:
        """The rows of token files."""
        start = document_start(tokenizer)
        found: list[RowSource] = []
        for shard in shards:
            none = np.zeros(0, dtype=np.int64)
            starts = none if start is None else positions_of(shard.token_ids, start)
            found.append(Rows(shard.token_ids, starts=starts, context=self.context, partial=partial))
        return JoinedRows(found)

    def _check_sizes(self, parts: Sequence[JoinedRows], validation: Sequence[Shard]) -> None:
        """Raises InputError for a source without a whole row, or a validation of less than a row."""
        for path, part in zip(self.paths, parts):
            if part.count == 0:
                raise InputError(
                    f"{path} must have a file of at least {self.context + 1} tokens (one context and the next token): "
                    "give more tokens, or a smaller data.context."
                )
        tokens = sum(len(shard.token_ids) for shard in validation)
        if tokens < self.context + 1:
            raise InputError(
                f"the validation must have at least {self.context + 1} tokens, got {tokens}: give more, or a larger "
                "data.val_fraction."
            )

    def _left_out(self, shards: Sequence[Shard], parts: Sequence[JoinedRows]) -> str | None:
        """Which training tokens are in no row: the last of each file, and files shorter than a row. None if they are
        less than a hundredth."""
        total = sum(len(shard.token_ids) for shard in shards)
        unused = total - self.context * sum(part.count for part in parts)
        if 100 * unused < total:
            return None
        short = sum(len(shard.token_ids) <= self.context for shard in shards)
        return (
            f"{unused:,} of {total:,} tokens. Of each file, those after the last whole sequence of data.context="
            f"{self.context} are left out; {short} of {len(shards)} files are shorter than one"
        )

    def _why_no_test(self, test: Sequence[Shard]) -> str | None:
        tokens = sum(len(shard.token_ids) for shard in test)
        if not test:
            return "data.test_fraction is 0" if self.test_fraction == 0 else "data.test_paths is empty"
        if tokens < self.context + 1:
            return f"it has {tokens} tokens, fewer than one context of {self.context} and the next token"
        return None

    def _held_out(self, shards: Sequence[Shard], tokenizer: Tokenizer) -> HeldOut:
        arrays = [shard.token_ids for shard in shards]
        tokens = sum(map(len, arrays))
        return HeldOut(
            self._rows(shards, tokenizer, partial=True),
            tokens=tokens,
            bytes_per_token=sum(bytes_of(array, tokenizer) for array in arrays) / tokens,
            unigram_entropy=unigram_entropy_of(arrays),
        )


def _check_apart(train: Sequence[Shard], validation: Sequence[Shard], test: Sequence[Shard]) -> None:
    """Raises InputError for a file that is given twice."""
    files = [shard.path.resolve() for shard in train]
    twice = {path for path in files if files.count(path) > 1}
    if twice:
        raise InputError(f"{min(twice)} is given twice in data.paths.")
    paths = [{shard.path.resolve() for shard in shards} for shards in (train, validation, test)]
    shared = (paths[0] & paths[1]) | (paths[0] & paths[2]) | (paths[1] & paths[2])
    if shared:
        raise InputError(f"{min(shared)} is in two splits; a file must belong to only one.")


def _hash_of_arrays(shards: Sequence[Shard]) -> str:
    digest = hashlib.sha256()
    for shard in shards:
        for part in parts_of(shard.token_ids):
            digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()
