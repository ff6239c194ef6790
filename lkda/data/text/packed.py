"""The base DataModule of packed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from lkda.checks import check_count
from lkda.data.datamodule import IndexedDataModule, TestSplit
from lkda.data.fingerprint import Fingerprint, check_same
from lkda.data.packing import RowSource, TrainingBatches, ValidationBatches, cu_seqlens_length
from lkda.data.text.tokenize import bytes_of, unigram_entropy
from lkda.data.text.tokenizer import vocabulary_rows
from lkda.data.text_sources import TextSource
from lkda.targets import IGNORE_INDEX


@dataclass(frozen=True)
class HeldOut:
    """A validation or test split.

    Attributes:
        rows: all of it.
        tokens: the number of tokens of its text.
        bytes_per_token: UTF-8 bytes of the text per predicted token.
        unigram_entropy: of the predicted tokens, in nats per token.
        sources: of a prepared corpus; empty if they are not known.
    """

    rows: RowSource
    tokens: int
    bytes_per_token: float
    unigram_entropy: float
    sources: Sequence[TextSource] = ()


@dataclass(frozen=True)
class PackedText:
    """Text in rows.

    Attributes:
        train_tokens: the number of tokens of the training text.
        test: None if there is no test split.
        no_test: the reason why there is none, in words.
        left_out: see `IndexedDataModule`.
        parts: see `TrainingBatches`.
    """

    tokenizer: Tokenizer
    fingerprint: Fingerprint
    train: RowSource
    train_tokens: int
    validation: HeldOut
    test: HeldOut | None = None
    no_test: str | None = None
    left_out: str | None = None
    parts: Sequence[tuple[int, float]] | None = None


class PackedDataModule(IndexedDataModule):
    """Packed batches {tokens, targets, cu_seqlens}; see `lkda.data.packing`. A subclass defines `_read`.

    Args:
        source: the name of the data.
        context: tokens per sequence.
        batch_size: sequences per batch.
        seed: of the order of the training batches.
        max_val_batches: measure only this many batches of the validation and of the test split, from the beginning.
            None means all.
        num_workers, pin_memory: see `IndexedDataModule`. A batch is a slice of a memory map, so few workers are needed.

    `prepare` also sets train_tokens and val_tokens, the numbers of tokens of the two splits.
    """

    def __init__(
        self,
        *,
        source: str,
        context: int,
        batch_size: int,
        seed: int,
        max_val_batches: int | None,
        num_workers: int,
        pin_memory: bool | None,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        positive = {"context": context, "batch_size": batch_size}
        if max_val_batches is not None:
            positive["max_val_batches"] = max_val_batches
        for name, value in positive.items():
            check_count(f"data.{name}", value, least=1)
        check_count("data.seed", seed, least=0)
        self.source, self.context, self.batch_size, self.seed = source, context, batch_size, seed
        self.max_val_batches = max_val_batches
        self._text: PackedText | None = None

    def measure_at_most(self, batches: int) -> None:
        """Lower `max_val_batches` to a number of batches, before `prepare`."""
        self.max_val_batches = min(batches, self.max_val_batches or batches)

    def _read(self) -> PackedText:
        """The text. Raises InputError for data that cannot be used."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Read the text, from the cache if it was tokenized before, and check it. A second call does nothing.

        Raises: InputError for data that cannot be used, or that are not the expected ones.
        """
        if self._text is not None:
            return
        text = self._read()
        check_same(self.expected, text.fingerprint, source=self.source)
        self.fingerprint, self.tokenizer = text.fingerprint, text.tokenizer
        self.vocab_size = vocabulary_rows(text.tokenizer)
        self.train_tokens, self.val_tokens = text.train_tokens, text.validation.tokens
        self._train, self._validation = text.train, text.validation.rows
        held_out = [text.validation, *([text.test] if text.test else [])]
        self._cu_seqlens_length = cu_seqlens_length(
            [text.train, *(split.rows for split in held_out)], batch_size=self.batch_size
        )
        self.val_batches = len(self.validation_batches())
        measured = self._measured(text.validation, text.tokenizer)
        self.unigram_entropy, self.bytes_per_token = measured.unigram_entropy, measured.bytes_per_token
        self.val_sources = measured.sources
        self.no_test, self.left_out = text.no_test, text.left_out
        if text.test is not None:
            batches, measured = self._measured_batches(text.test.rows), self._measured(text.test, text.tokenizer)
            measures = measured.bytes_per_token, measured.unigram_entropy
            self.test = TestSplit(batches, text.test.tokens, *measures, sources=measured.sources)
        self._text = text

    def training_batches(self, *, rank: int, world_size: int) -> TrainingBatches:
        assert self._text is not None, "prepare() comes first"
        return TrainingBatches(
            self._text.train,
            batch_size=self.batch_size,
            cu_seqlens_length=self._cu_seqlens_length,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            parts=self._text.parts,
        )

    def validation_batches(self) -> ValidationBatches:
        return self._measured_batches(self._validation)

    def _measured(self, split: HeldOut, tokenizer: Tokenizer) -> HeldOut:
        """The split with the bytes, the entropy and the sources of the part that is measured."""
        batches = self._measured_batches(split.rows)
        if len(batches) * self.batch_size >= split.rows.count:
            return split
        targets = np.concatenate([batches[n]["targets"].numpy()[0] for n in range(len(batches))])
        predicted = targets[targets != IGNORE_INDEX]
        # Of a split with sources, these are its tokens from the second on.
        ends = [(source, min(source.end, len(predicted) + 1)) for source in split.sources]
        return replace(
            split,
            bytes_per_token=bytes_of(predicted, tokenizer) / len(predicted),
            unigram_entropy=unigram_entropy(predicted),
            sources=[
                replace(source, end=end, bytes=bytes_of(predicted[max(0, source.begin - 1) : end - 1], tokenizer))
                for source, end in ends
                if source.begin < end
            ],
        )

    def _measured_batches(self, rows: RowSource) -> ValidationBatches:
        return ValidationBatches(
            rows,
            batch_size=self.batch_size,
            cu_seqlens_length=self._cu_seqlens_length,
            limit=self.max_val_batches,
        )
