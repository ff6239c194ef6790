"""The DataModule of prompts with completions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.fingerprint import of_texts, of_tokenizer
from lkda.data.progress import patient_progress
from lkda.data.text.cache import building, expanded, metadata_of, publish
from lkda.data.text.examples import ExampleRows, Examples, read_examples, write_examples
from lkda.data.text.files import Sources, file_sources
from lkda.data.text.packed import HeldOut, PackedDataModule, PackedText
from lkda.data.text.table import Table
from lkda.data.text.tokenize import train_on, unigram_entropy
from lkda.data.text.tokenizer import check_vocab_size, load_tokenizer
from lkda.io import default_cache_dir

# Increase this when the content of a directory in the cache changes.
FORMAT = 1
TOO_LONG = ("error", "drop")


@dataclass(frozen=True)
class Pairs:
    """Some of the examples of a table, read from its files at every iteration."""

    table: Table
    numbers: np.ndarray

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((prompt, completion) for prompt, completion in self.table.rows(self.numbers))


class CompletionsDataModule(PackedDataModule):
    """Packed batches of prompts with completions {tokens, targets, cu_seqlens}. Only the tokens of the completions are
    predicted, and the token that ends them.

    Args:
        paths: .jsonl or .parquet files, directories or globs.
        val_paths, val_fraction, test_paths, test_fraction: as of `TextDataModule`.
        prompt_column, completion_column: the columns of an example.
        too_long: "error" to reject examples that do not fit into a context, "drop" to leave them out.
        vocab_size: of the byte-level BPE that is trained on the training examples.
        tokenizer_path: a tokenizer.json to use instead of training a tokenizer.
        cache_dir: None means LKDA_CACHE, or ~/.cache/lkda.
        context, batch_size, seed, max_val_batches, num_workers, pin_memory: see `PackedDataModule`.

    Attributes:
        dropped: the number of examples that were left out because they do not fit into a context.
    """

    dropped: int = 0

    def __init__(
        self,
        *,
        paths: Sequence[str],
        context: int,
        batch_size: int,
        val_paths: Sequence[str] = (),
        val_fraction: float = 0.05,
        test_paths: Sequence[str] = (),
        test_fraction: float = 0.05,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        too_long: str = "error",
        vocab_size: int = 4096,
        seed: int = 0,
        tokenizer_path: str | None = None,
        cache_dir: str | None = None,
        max_val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            source="completions",
            context=context,
            batch_size=batch_size,
            seed=seed,
            max_val_batches=max_val_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        if too_long not in TOO_LONG:
            raise InputError(f"data.too_long must be {' or '.join(TOO_LONG)}, got {too_long!r}.")
        if prompt_column == completion_column:
            raise InputError(f"data.prompt_column and data.completion_column are both {prompt_column!r}.")
        if not tokenizer_path:
            check_vocab_size(vocab_size)
        self.paths, self.val_paths, self.test_paths = paths, val_paths, test_paths
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.columns, self.too_long = (prompt_column, completion_column), too_long
        self.wanted_vocab_size, self.tokenizer_path = vocab_size, tokenizer_path
        self.cache_dir = expanded(cache_dir) if cache_dir else default_cache_dir()

    def _read(self) -> PackedText:
        sources = file_sources(
            self.paths,
            val_paths=self.val_paths,
            val_fraction=self.val_fraction,
            test_paths=self.test_paths,
            test_fraction=self.test_fraction,
            text_column=self.columns[1],
            suffixes=(".jsonl", ".parquet"),
        )
        entry = self._tokenized(sources)
        metadata = metadata_of(entry)
        assert metadata is not None, "it was published"
        tokenizer = load_tokenizer(entry / "tokenizer.json")
        names = [name for name in ("train", "validation", "test") if name in metadata["bytes"]]
        examples = {name: read_examples(entry, name) for name in names}
        rows = {name: self._rows(examples[name], name) for name in names}
        given, used = len(examples["train"].answers), len(rows["train"].numbers)
        held_out = {name: _held_out(examples[name], rows[name], metadata["bytes"][name]) for name in names[1:]}
        return PackedText(
            tokenizer=tokenizer,
            fingerprint={**metadata["sha256"], "tokenizer": of_tokenizer(tokenizer)},
            train=rows["train"],
            train_tokens=len(examples["train"].token_ids),
            validation=held_out["validation"],
            test=held_out.get("test"),
            no_test=None if "test" in names else "data.test_fraction is 0",
            left_out=f"{given - used:,} of {given:,} examples, which are too long" if used < given else None,
        )

    def _rows(self, examples: Examples, name: str) -> ExampleRows:
        """The rows of the examples that fit into a context. Raises InputError for others, unless they are dropped."""
        places = np.diff(examples.starts) - 1
        fitting = np.flatnonzero(places <= self.context)
        excess = len(places) - len(fitting)
        if excess and (self.too_long == "error" or not len(fitting)):
            drop = ", or data.too_long=drop to leave them out" if len(fitting) else ""
            raise InputError(
                f"{excess} of {len(places)} examples for {name} have more than data.context={self.context} tokens, the "
                f"longest {int(places.max())}: give a larger data.context{drop}."
            )
        self.dropped += excess
        return ExampleRows(examples, fitting, context=self.context)

    def _tokenized(self, sources: Sources) -> Path:
        """The directory of the tokenized examples in the cache, built there if it does not exist."""
        given = load_tokenizer(self.tokenizer_path) if self.tokenizer_path else None
        words = [FORMAT, sources.fingerprint(), self.columns]
        words.append(self.wanted_vocab_size if given is None else given.to_str())
        entry = self.cache_dir / "completions" / hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
        if metadata_of(entry) is None:
            with building(entry) as scratch:
                if metadata_of(entry) is None:
                    built = scratch / "entry"
                    built.mkdir()
                    publish(built, entry, self._build(built, sources, given))
        return entry

    def _build(self, built: Path, sources: Sources, given: Tokenizer | None) -> dict[str, dict[str, int | str]]:
        splits = self._splits(sources)
        digests = {name: of_texts(map(json.dumps, pairs)) for name, pairs in splits.items()}
        with patient_progress() as progress:
            tokenizer = given
            if tokenizer is None:
                texts = (text for pair in splits["train"] for text in pair)
                size = sum(len(text) for pair in splits["train"] for text in pair)
                tokenizer = train_on(texts, vocab_size=self.wanted_vocab_size, size=size, progress=progress)
            (built / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            sizes = {
                name: write_examples(built, name, pairs, tokenizer=tokenizer, progress=progress)
                for name, pairs in splits.items()
            }
        return {"bytes": {**sizes}, "sha256": {**digests}}

    def _splits(self, sources: Sources) -> dict[str, Pairs]:
        """The examples of each split. Raises InputError for an example without a completion, or too few examples."""
        train = self._pairs(sources.train)
        count = len(train.numbers)
        order = np.random.default_rng(0).permutation(count)
        first = math.ceil(sources.fraction * count)
        second = first + math.ceil(sources.test_fraction * count)
        if second >= count:
            raise InputError(f"{count} examples are too few to hold out {second}: give more, or smaller fractions.")
        parts = (order[second:], order[:first], order[first:second])
        cut = [Pairs(train.table, train.numbers[np.sort(part)]) for part in parts]
        found = {
            "train": cut[0],
            "validation": self._pairs(sources.validation) if sources.validation else cut[1],
            "test": self._pairs(sources.test) if sources.test else cut[2],
        }
        return {name: pairs for name, pairs in found.items() if len(pairs.numbers)}

    def _pairs(self, paths: Sequence[Path]) -> Pairs:
        """All examples of files. Raises InputError for one without a prompt or a completion. A prompt may be empty."""
        options = dict(zip(self.columns, ("data.prompt_column", "data.completion_column")))
        count = 0
        for path in paths:
            rows = Table([path], self.columns, options, complete=True).rows()
            for number, (_, completion) in enumerate(rows, 1):
                if not completion:
                    raise InputError(
                        f"row {number} of {path} has no text in column {self.columns[1]!r}: every example needs a "
                        "completion."
                    )
                count += 1
        if not count:
            raise InputError(f"{paths[0]} has no examples.")
        return Pairs(Table(paths, self.columns, options), np.arange(count))


def _held_out(examples: Examples, rows: ExampleRows, size: int) -> HeldOut:
    predicted = examples.predicted_tokens()
    return HeldOut(
        rows,
        tokens=len(examples.token_ids),
        bytes_per_token=size / len(predicted),
        unigram_entropy=unigram_entropy(predicted),
    )
