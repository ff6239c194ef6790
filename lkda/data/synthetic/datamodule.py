"""The DataModule of tasks whose examples are drawn, not read: batches of one shape each, made when asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lkda.checks import InputError, check_count
from lkda.data.datamodule import IndexedDataModule
from lkda.data.fingerprint import check_same, of_arrays, of_texts
from lkda.data.packing import IGNORED
from lkda.data.shuffle import endless

Examples = tuple[np.ndarray, np.ndarray]  # tokens and targets [B, T] int64; IGNORED where nothing is asked
_TRAINING, _VALIDATION = 0, 1
_SHOWN = 16  # examples of a part that its fingerprint holds


class SyntheticDataModule(IndexedDataModule):
    """Trains on an endless mixture of parts, each of one shape, and validates on parts of their own.

    A batch {tokens, targets [B, T], cu_seqlens None, asked [N], part} holds examples of one part; `asked` are the flat
    positions of targets, the only ones that need logits; `part` is the number of the part among its list. What batch n
    holds follows from (seed, n) alone: an epoch is each part's `examples` cut into batches, in an order of its own.

    Args:
        train, validation: parts: {"length", "examples", ...}, the rest being what a subclass's `draw` takes.
        vocab_size: of the model's embedding.
        batch_size: examples a batch and device.
        seed: of the training examples and their order; the validation examples are the same for every seed.
        fresh: draw new examples every epoch; else each epoch has the first one's batches, in another order.
        num_workers, pin_memory: see `IndexedDataModule`.

    Attributes:
        fingerprint_name: of a task that has another name than when it was first trained on; else None.
    Raises: ValueError for a part that cannot be drawn, or a count out of its range.
    """

    fingerprint_name: str | None = None

    def __init__(
        self,
        *,
        train: Sequence[Mapping[str, int]],
        validation: Sequence[Mapping[str, int]],
        vocab_size: int,
        batch_size: int,
        seed: int,
        fresh: bool,
        num_workers: int,
        pin_memory: bool | None,
    ) -> None:
        super().__init__(num_workers=num_workers, pin_memory=pin_memory)
        for name, value in {"vocab_size": vocab_size, "batch_size": batch_size}.items():
            check_count(f"data.{name}", value, least=1)
        check_count("data.seed", seed, least=0)
        self.vocab_size, self.batch_size, self.seed, self.fresh = vocab_size, batch_size, seed, fresh
        self.train_parts = [self._checked("train", part) for part in train]
        self.parts = [self._checked("validation", part) for part in validation]
        if not self.train_parts or not self.parts:
            raise InputError("data.train and data.validation need a part each, as in [{length: 64, examples: 1000}].")
        self.source = type(self).__module__.rpartition(".")[2]
        self.context = max(part["length"] for part in self.train_parts)

    def draw(self, *count_and_rng: Any, **shape: Any) -> Examples:
        """draw(count, rng, *, length, ...): that many examples of a part's shape, its entries but `examples`."""
        raise NotImplementedError

    def check(self, *_: Any, **shape: Any) -> None:
        """check(*, length, ...): raises ValueError for a shape that cannot be drawn."""
        raise NotImplementedError

    def _checked(self, group: str, part: Mapping[str, int]) -> dict[str, int]:
        if not isinstance(part, Mapping):
            raise InputError(f"a part of data.{group} is like {{length: 64, examples: 1000}}; got {part!r}.")
        plain = dict(part)
        missing = {"length", "examples"} - plain.keys()
        if missing:
            raise InputError(f"a part of data.{group} lacks {', '.join(sorted(missing))}: {plain}.")
        for name, value in plain.items():
            check_count(f"{name} of a part of data.{group}", value, least=1)
        try:
            self.check(**_shape(plain))
        except TypeError as error:
            raise InputError(f"a part of data.{group} has the wrong entries: {plain} ({error}).") from error
        return plain

    def prepare(self) -> None:
        self.val_batches = len(self.validation_batches())
        total = sum(part["examples"] for part in self.train_parts)
        mixture = [{**_shape(part), "share": part["examples"] / total} for part in self.train_parts]
        self.fingerprint = {
            "train": self._fingerprint(self.train_parts, mixture, self.fresh),
            "validation": self._fingerprint(self.parts, self.parts),
            "tokenizer": None,
        }
        check_same(self.expected, self.fingerprint, source=self.source)

    def _fingerprint(self, parts: Sequence[Mapping[str, int]], *told: Any) -> str:
        """Of what is `told` and of a few examples of each part, in which every option of the drawing shows.

        The seed is left out: it says which examples of the same data a run sees.
        """
        drawn = [self.draw(_SHOWN, np.random.default_rng(0), **_shape(part)) for part in parts]
        arrays = of_arrays(*(array for example in drawn for array in example))
        return of_texts([json.dumps([self.fingerprint_name or self.source, self.vocab_size, *told]), arrays])

    @property
    def tokens_per_batch(self) -> int:
        """The mean over an epoch, for parts differ in length."""
        epoch = _Epoch(self.train_parts, self.batch_size)
        total = sum(n * part["length"] for n, part in zip(epoch.batches, self.train_parts, strict=True))
        return round(self.batch_size * total / epoch.size)

    def training_batches(self, *, rank: int, world_size: int) -> TrainingBatches:
        return TrainingBatches(self, rank=rank, world_size=world_size)

    def validation_batches(self) -> ValidationBatches:
        return ValidationBatches(self)

    def batch(self, part: Mapping[str, int], number: int, count: int, *key: int) -> dict[str, Any]:
        """`count` examples of `part`, which has that number; others for every other `key`."""
        tokens, targets = self.draw(count, np.random.default_rng(key), **_shape(part))
        asked = torch.from_numpy(np.flatnonzero(targets != IGNORED))
        tensors: dict[str, Tensor | None] = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return tensors | {"cu_seqlens": None, "asked": asked, "part": number}


class _Epoch:
    """How the batches of an epoch, numbered part by part, share out among the parts."""

    def __init__(self, parts: Sequence[Mapping[str, int]], batch_size: int) -> None:
        self.batches = [max(1, part["examples"] // batch_size) for part in parts]
        self.ends = np.cumsum(self.batches)
        self.size = int(self.ends[-1])


class TrainingBatches(Dataset[dict[str, Any]]):
    """Batch n of the endless stream. Ranks draw different batches of the same part."""

    def __init__(self, data: SyntheticDataModule, *, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.epoch = _Epoch(data.train_parts, data.batch_size)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        place = int(endless(np.array([batch]), self.epoch.size, seed=self.data.seed)[0])
        number = int(np.searchsorted(self.epoch.ends, place, side="right"))
        epoch = batch // self.epoch.size if self.data.fresh else 0
        key = (_TRAINING, self.data.seed, epoch, place, self.rank)
        return self.data.batch(self.data.train_parts[number], number, self.data.batch_size, *key)


class ValidationBatches(Dataset[dict[str, Any]]):
    """The validation parts one after another."""

    def __init__(self, data: SyntheticDataModule) -> None:
        self.data = data
        self.places = [
            (number, first, min(data.batch_size, part["examples"] - first))
            for number, part in enumerate(data.parts)
            for first in range(0, part["examples"], data.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        number, first, count = self.places[batch]
        return self.data.batch(self.data.parts[number], number, count, _VALIDATION, number, first)


def _shape(part: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in part.items() if name != "examples"}
