"""Recall of a passage that occurred far back in a text: the passage is repeated, and its continuation is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lkda.checks import InputError, check_count, check_distinct
from lkda.data.datamodule import IndexedDataModule, TestSplit
from lkda.data.text.cache import expanded
from lkda.data.text.tokenize import load_tokenized, without_test
from lkda.data.text.tokenizer import vocabulary_rows
from lkda.io import default_cache_dir
from lkda.targets import IGNORE_INDEX


class Needle(IndexedDataModule):
    """Data for evaluation only. A sequence is held-out text with a passage from elsewhere inserted at some depth. The
    passage is repeated at the end, and all its tokens after the first `cue` are predicted there.

    The text is from the validation split, or with split=test from the test split. A subset is {"length", "depth",
    "needles"}. Each length also has a subset with needles = 0, in which the passage is not inserted. It shows how well
    the passage is predicted without recall. A batch is one sequence. The sequences are the same for every model and
    seed.

    Args:
        directory: of tokenized text (scripts/prepare_data.py). None means `prose` in cache_dir.
        lengths: tokens per sequence.
        depths: positions where the passage is inserted, in percent of the text before the repetition.
        examples: number of sequences of each subset.
        cue, answer: numbers of tokens of the passage that are given, and that are predicted.
        cache_dir: None means LKDA_CACHE, or ~/.cache/lkda.
        pin_memory: see `IndexedDataModule`.
    Raises: InputError for a number outside its range.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        depths: Sequence[int],
        examples: int,
        cue: int,
        answer: int,
        directory: str | None = None,
        cache_dir: str | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(pin_memory=pin_memory)
        for name, value in {"examples": examples, "cue": cue, "answer": answer}.items():
            check_count(f"data.{name}", value, least=1)
        for length in lengths:
            check_count("data.lengths", length, least=4 * (cue + answer))
        for depth in depths:
            check_count("data.depths", depth, least=0)
        check_distinct("data.lengths", lengths)
        check_distinct("data.depths", depths)
        if not lengths or not depths or max(depths) > 100:
            raise InputError(
                f"data.lengths and data.depths need at least one entry, depths up to 100; got {lengths}, {depths}."
            )
        home = expanded(cache_dir) if cache_dir else default_cache_dir()
        self.directory = expanded(directory) if directory else home / "prose"
        self.cue, self.answer, self.examples = cue, answer, examples
        hidden = [{"length": length, "depth": depth, "needles": 1} for length in lengths for depth in depths]
        self.val_subsets = hidden + [{"length": length, "depth": 0, "needles": 0} for length in lengths]
        self.source, self.context, self.batch_size = "needle", max(lengths), 1
        self.val_batches = examples * len(self.val_subsets)

    def prepare(self) -> None:
        """Load the tokenized text.

        Raises: InputError if there is none, or if it is too short for the longest sequence.
        """
        tokenized = load_tokenized(self.directory)
        self.tokenizer, self._validation = tokenized.tokenizer, tokenized.validation
        self.fingerprint = tokenized.fingerprint
        self.vocab_size = vocabulary_rows(tokenized.tokenizer)
        least = 2 * self.context
        if len(tokenized.validation) < least:
            there = f"the validation split of {self.directory} has {len(tokenized.validation)} tokens"
            raise InputError(f"{there}, but sequences of {self.context} need twice as many: shorten data.lengths.")
        if tokenized.test is None:
            self.no_test = without_test(self.directory)
        elif len(tokenized.test) < least:
            self.no_test = (
                f"its text has {len(tokenized.test)} tokens, but sequences of {self.context} need twice as many"
            )
        else:
            self.test = TestSplit(_Sequences(self, tokenized.test), tokens=len(tokenized.test))

    @property
    def tokens_per_batch(self) -> int:
        raise InputError("data=needle is only for evaluation: use scripts/evaluate.py ckpt=RUN data=needle.")

    def validation_batches(self) -> Dataset[Any]:
        return _Sequences(self, self._validation)

    def sequence(self, token_ids: np.ndarray, subset: Mapping[str, int], number: int) -> np.ndarray:
        """The tokens of an example made from `token_ids`, and the next token, [length + 1] int64."""
        length, depth, needles = subset["length"], subset["depth"], subset["needles"]
        rng = np.random.default_rng((length, number))  # the same text and passage at every depth
        passage = self.cue + self.answer
        text = length + 1 - passage * (1 + needles)
        begin = int(rng.integers(len(token_ids) - text - passage))
        # The passage is taken from outside the text.
        where = int(rng.integers(len(token_ids) - text - 2 * passage))
        where += (text + passage) * (where > begin - passage)
        tokens, needle = token_ids[begin : begin + text], token_ids[where : where + passage]
        at = text * depth // 100
        return np.concatenate([tokens[:at], *[needle] * needles, tokens[at:], needle]).astype(np.int64)


class _Sequences(Dataset[Any]):
    """The sequences, subset by subset."""

    def __init__(self, data: Needle, token_ids: np.ndarray) -> None:
        self.data, self.token_ids = data, token_ids

    def __len__(self) -> int:
        return self.data.val_batches

    def __getitem__(self, batch: int) -> dict[str, Any]:
        subset, number = divmod(batch, self.data.examples)
        tokens = torch.from_numpy(self.data.sequence(self.token_ids, self.data.val_subsets[subset], number))
        targets = torch.full_like(tokens[1:], IGNORE_INDEX)
        targets[-self.data.answer :] = tokens[-self.data.answer :]
        target_positions = torch.arange(len(targets) - self.data.answer, len(targets))
        shaped = {"tokens": tokens[None, :-1], "targets": targets[None]}
        return shaped | {"cu_seqlens": None, "target_positions": target_positions, "subset": subset}
