"""A passage that stood far back, repeated: does a model of text still know how it goes on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lkda.checks import InputError, check_count
from lkda.data.datamodule import IndexedDataModule, TestSplit
from lkda.data.packing import IGNORED
from lkda.data.text.cache import default_cache_dir, expanded
from lkda.data.text.tokenize import load_prepared, without_test
from lkda.data.text.tokenizer import vocabulary_rows


class Needle(IndexedDataModule):
    """For measuring alone: validation text (of the test split: test text) of each length, a passage of it hidden at
    each depth, and at the end the passage once more, of which all but the first `cue` tokens are asked.

    A part is {"length", "depth", "needles"}; of each length there is one with needles = 0, where the passage was never
    hidden: what is guessed without it. Batches are one sequence each, the same for every model and seed.

    Args:
        directory: of prepared text (scripts/prepare_data.py); where None, `prose` in cache_dir.
        lengths: tokens of a sequence.
        depths: where the passage is hidden, in percent of the text before its end.
        examples: of each part.
        cue, answer: tokens of the passage that are given, and asked.
        cache_dir: where None, LKDA_CACHE, or ~/.cache/lkda.
        pin_memory: see `IndexedDataModule`.
    Raises: ValueError for a number out of its range.
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
        if not lengths or not depths or max(depths) > 100:
            raise InputError(
                f"data.lengths and data.depths need an entry each, depths up to 100; got {lengths}, {depths}."
            )
        home = expanded(cache_dir) if cache_dir else default_cache_dir()
        self.directory = expanded(directory) if directory else home / "prose"
        self.cue, self.answer, self.examples = cue, answer, examples
        hidden = [{"length": length, "depth": depth, "needles": 1} for length in lengths for depth in depths]
        self.parts = hidden + [{"length": length, "depth": 0, "needles": 0} for length in lengths]
        self.source, self.context, self.batch_size = "needle", max(lengths), 1
        self.val_batches = examples * len(self.parts)

    def prepare(self) -> None:
        """Raises: ValueError where there is no prepared text, or less of it than the longest sequence wants."""
        prepared = load_prepared(self.directory)
        self.tokenizer, self._validation = prepared.tokenizer, prepared.validation
        self.fingerprint = prepared.fingerprint
        self.vocab_size = vocabulary_rows(prepared.tokenizer)
        least = 2 * self.context
        if len(prepared.validation) < least:
            there = f"{self.directory} validates on {len(prepared.validation)} tokens"
            raise InputError(f"{there}; sequences of {self.context} want twice as many: shorten data.lengths.")
        if prepared.test is None:
            self.no_test = without_test(self.directory)
        elif len(prepared.test) < least:
            self.no_test = f"its text has {len(prepared.test)} tokens; sequences of {self.context} want twice as many"
        else:
            self.test = TestSplit(_Sequences(self, prepared.test), tokens=len(prepared.test))

    @property
    def tokens_per_batch(self) -> int:
        raise InputError(
            "data=needle measures models of text and trains none: scripts/evaluate.py ckpt=RUN data=needle."
        )

    def validation_batches(self) -> Dataset[Any]:
        return _Sequences(self, self._validation)

    def sequence(self, stream: np.ndarray, part: Mapping[str, int], number: int) -> np.ndarray:
        """The tokens of an example that is made of `stream`, and the one after the last."""
        length, depth, needles = part["length"], part["depth"], part["needles"]
        draw = np.random.default_rng((length, number))  # the same text and passage at every depth
        passage = self.cue + self.answer
        text = length + 1 - passage * (1 + needles)
        begin = int(draw.integers(len(stream) - text - passage))
        # Of what lies outside of the text, wherever that is.
        where = int(draw.integers(len(stream) - text - 2 * passage))
        where += (text + passage) * (where > begin - passage)
        tokens, needle = stream[begin : begin + text], stream[where : where + passage]
        at = text * depth // 100
        return np.concatenate([tokens[:at], *[needle] * needles, tokens[at:], needle]).astype(np.int64)


class _Sequences(Dataset[Any]):
    """Part by part, examples of each."""

    def __init__(self, data: Needle, stream: np.ndarray) -> None:
        self.data, self.stream = data, stream

    def __len__(self) -> int:
        return self.data.val_batches

    def __getitem__(self, batch: int) -> dict[str, Any]:
        part, number = divmod(batch, self.data.examples)
        tokens = torch.from_numpy(self.data.sequence(self.stream, self.data.parts[part], number))
        targets = torch.full_like(tokens[1:], IGNORED)
        targets[-self.data.answer :] = tokens[-self.data.answer :]
        asked = torch.arange(len(targets) - self.data.answer, len(targets))
        shaped = {"tokens": tokens[None, :-1], "targets": targets[None]}
        return shaped | {"cu_seqlens": None, "asked": asked, "part": part}
