"""Random tokens, to measure the speed and the memory of training: there is nothing to learn, and nothing to prepare."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lkda.checks import InputError, check_count
from lkda.data import packing
from lkda.data.datamodule import IndexedDataModule, Numbered
from lkda.data.fingerprint import check_same, of_texts
from lkda.data.packing import Rows, cu_seqlens_length

# Packed rows are cut from this many batches of documents, which repeat in another order in every epoch.
POOL_BATCHES = 64
_TRAINING, _VALIDATION, _POOL = 0, 1, 2


class RandomTokens(IndexedDataModule):
    """Tokens that are independent and equally likely. Each target is the next token.

    Without packing, a batch is {tokens, targets [batch_size, context] int64, cu_seqlens None}: each row is one
    document. With packing, a batch has the form of packed text, see `lkda.data.packing`: tokens and targets
    [1, batch_size * context]. The logarithm of a document's length is then uniform, from `shortest` to four contexts.

    Args:
        vocab_size: the number of different tokens, at least 2.
        context: tokens per row.
        batch_size: rows per batch and device.
        packed: whether rows are packed with documents of many lengths.
        shortest: tokens of the shortest document that is packed.
        val_batches: the number of validation batches.
        seed: of the training batches. The validation batches are the same for every seed.
        num_workers, pin_memory: see `IndexedDataModule`.
    Raises: InputError for a number outside its range.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        context: int = 2048,
        batch_size: int = 8,
        packed: bool = False,
        shortest: int = 32,
        val_batches: int = 4,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        check_count("data.vocab_size", vocab_size, least=2)
        for name, value in {"context": context, "batch_size": batch_size, "val_batches": val_batches}.items():
            check_count(f"data.{name}", value, least=1)
        check_count("data.shortest", shortest, least=1)
        check_count("data.seed", seed, least=0)
        if packed and shortest > 4 * context:
            raise InputError(f"data.shortest must be at most four times data.context, {4 * context}; got {shortest}.")
        self.source = "random"
        self.vocab_size, self.context, self.batch_size = vocab_size, context, batch_size
        self.packed, self.shortest, self.val_batches, self.seed = packed, shortest, val_batches, seed

    def prepare(self) -> None:
        options = [self.vocab_size, self.context, self.packed, self.shortest if self.packed else None]
        description = of_texts([json.dumps(["random", *options])])
        self.fingerprint = {"train": description, "validation": description, "tokenizer": None}
        check_same(self.expected, self.fingerprint, source=self.source)

    def training_batches(self, *, rank: int, world_size: int) -> Numbered:
        if not self.packed:
            return OneDocumentRows(self, _TRAINING, self.seed, rank)
        rows = self._packed_rows(POOL_BATCHES * world_size, _TRAINING, self.seed)
        return packing.TrainingBatches(
            rows,
            batch_size=self.batch_size,
            cu_seqlens_length=self._cu_seqlens_length(rows),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def validation_batches(self) -> Dataset[Any]:
        if not self.packed:
            return OneDocumentRows(self, _VALIDATION, length=self.val_batches)
        rows = self._packed_rows(self.val_batches, _VALIDATION)
        length = self._cu_seqlens_length(rows)
        return packing.ValidationBatches(rows, batch_size=self.batch_size, cu_seqlens_length=length)

    def _cu_seqlens_length(self, rows: Rows) -> int:
        return cu_seqlens_length([rows], batch_size=self.batch_size)

    def _packed_rows(self, batches: int, *key: int) -> Rows:
        """Rows for this many batches, cut from documents that follow each other."""
        rng = np.random.default_rng((_POOL, *key))
        size = batches * self.batch_size * self.context + 1
        low, high = np.log([self.shortest, 4 * self.context])
        lengths = np.exp(rng.uniform(low, high, size // self.shortest + 1)).round().astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        starts = starts[starts < size]
        tokens = rng.integers(self.vocab_size, size=size, dtype=np.int32)
        return Rows(tokens, starts=starts, context=self.context, partial=False)


class OneDocumentRows(Dataset[dict[str, Tensor | None]]):
    """Batches whose rows are one document each. The content of batch n depends only on (key, n).

    Args:
        length: the number of batches; None if they have no end.
    """

    def __init__(self, data: RandomTokens, *key: int, length: int | None = None) -> None:
        self.data, self.key, self.length = data, key, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("training batches have no end")
        return self.length

    def __getitem__(self, batch: int) -> dict[str, Tensor | None]:
        if self.length is not None and not 0 <= batch < self.length:
            raise IndexError(batch)
        rng = np.random.default_rng((*self.key, batch))
        tokens = torch.from_numpy(
            rng.integers(self.data.vocab_size, size=(self.data.batch_size, self.data.context + 1))
        )
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "targets": tokens[:, 1:].contiguous(),
            "cu_seqlens": None,
        }
