"""The DataModule of tasks whose examples are sampled, not read: batches of one shape each, made when asked for."""

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
from lkda.data.shuffle import shuffled
from lkda.special_tokens import IGNORE_INDEX

Examples = tuple[np.ndarray, np.ndarray]  # tokens and targets [B, T] int64; IGNORE_INDEX where nothing is predicted
_TRAINING, _VALIDATION = 0, 1
_SHOWN = 16  # examples of a subset that its fingerprint holds


class SyntheticDataModule(IndexedDataModule):
    """Trains on an unlimited mixture of subsets, each of one shape, and validates on subsets of their own.

    A batch {tokens, targets [B, T], cu_seqlens None, target_positions [N], subset} holds examples of one subset;
    `target_positions` are the
    positions of targets in the flattened batch, the only ones that need logits; `subset` is the index of the subset in
    its list. What batch n holds follows from (seed, n) alone: an epoch is each subset's `examples` cut into batches, in
    an order of its own.

    Args:
        train, validation: subsets: {"length", "examples", ...}, the rest being what a subclass's `sample` takes.
        vocab_size: of the model's embedding.
        batch_size: examples a batch and device.
        seed: of the training examples and their order; the validation examples are the same for every seed.
        fresh: sample new examples every epoch; else each epoch has the first one's batches, in another order.
        num_workers, pin_memory: see `IndexedDataModule`.

    Attributes:
        fingerprint_name: of a task that has another name than when it was first trained on; else None.
    Raises: InputError for a subset that cannot be sampled, or a count out of its range.
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
        self.train_subsets = [self._checked("train", subset) for subset in train]
        self.val_subsets = [self._checked("validation", subset) for subset in validation]
        if not self.train_subsets or not self.val_subsets:
            raise InputError("data.train and data.validation need a subset each, as in [{length: 64, examples: 1000}].")
        self.source = type(self).__module__.rpartition(".")[2]
        self.context = max(subset["length"] for subset in self.train_subsets)

    def sample(self, *count_and_rng: Any, **shape: Any) -> Examples:
        """sample(count, rng, *, length, ...): that many examples of a subset's shape, its entries but `examples`."""
        raise NotImplementedError

    def check(self, *_: Any, **shape: Any) -> None:
        """check(*, length, ...): raises ValueError for a shape that cannot be sampled."""
        raise NotImplementedError

    def _checked(self, group: str, subset: Mapping[str, int]) -> dict[str, int]:
        if not isinstance(subset, Mapping):
            raise InputError(f"a subset of data.{group} is like {{length: 64, examples: 1000}}; got {subset!r}.")
        plain = dict(subset)
        missing = {"length", "examples"} - plain.keys()
        if missing:
            raise InputError(f"a subset of data.{group} lacks {', '.join(sorted(missing))}: {plain}.")
        for name, value in plain.items():
            check_count(f"{name} of a subset of data.{group}", value, least=1)
        try:
            self.check(**_shape(plain))
        except TypeError as error:
            raise InputError(f"a subset of data.{group} has the wrong entries: {plain} ({error}).") from error
        return plain

    def prepare(self) -> None:
        self.val_batches = len(self.validation_batches())
        total = sum(subset["examples"] for subset in self.train_subsets)
        mixture = [{**_shape(subset), "share": subset["examples"] / total} for subset in self.train_subsets]
        self.fingerprint = {
            "train": self._fingerprint(self.train_subsets, mixture, self.fresh),
            "validation": self._fingerprint(self.val_subsets, self.val_subsets),
            "tokenizer": None,
        }
        check_same(self.expected, self.fingerprint, source=self.source)

    def _fingerprint(self, subsets: Sequence[Mapping[str, int]], *told: Any) -> str:
        """Of what is `told` and of a few examples of each subset, in which every option of the sampling shows.

        The seed is left out: it says which examples of the same data a run sees.
        """
        sampled = [self.sample(_SHOWN, np.random.default_rng(0), **_shape(subset)) for subset in subsets]
        arrays = of_arrays(*(array for example in sampled for array in example))
        return of_texts([json.dumps([self.fingerprint_name or self.source, self.vocab_size, *told]), arrays])

    @property
    def tokens_per_batch(self) -> int:
        """The mean over an epoch, for subsets differ in length."""
        epoch = _Epoch(self.train_subsets, self.batch_size)
        total = sum(n * subset["length"] for n, subset in zip(epoch.batches, self.train_subsets, strict=True))
        return round(self.batch_size * total / epoch.size)

    def training_batches(self, *, rank: int, world_size: int) -> TrainingBatches:
        return TrainingBatches(self, rank=rank, world_size=world_size)

    def validation_batches(self) -> ValidationBatches:
        return ValidationBatches(self)

    def batch(self, subset: Mapping[str, int], number: int, count: int, *key: int) -> dict[str, Any]:
        """`count` examples of `subset`, which has that number; others for every other `key`."""
        tokens, targets = self.sample(count, np.random.default_rng(key), **_shape(subset))
        target_positions = torch.from_numpy(np.flatnonzero(targets != IGNORE_INDEX))
        tensors: dict[str, Tensor | None] = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return tensors | {"cu_seqlens": None, "target_positions": target_positions, "subset": number}


class _Epoch:
    """How the batches of an epoch, numbered subset by subset, share out among the subsets."""

    def __init__(self, subsets: Sequence[Mapping[str, int]], batch_size: int) -> None:
        self.batches = [max(1, subset["examples"] // batch_size) for subset in subsets]
        self.ends = np.cumsum(self.batches)
        self.size = int(self.ends[-1])


class TrainingBatches(Dataset[dict[str, Any]]):
    """Batch n of an unlimited sequence. Ranks sample different batches of the same subset."""

    def __init__(self, data: SyntheticDataModule, *, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.epoch = _Epoch(data.train_subsets, data.batch_size)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        place = int(shuffled(np.array([batch]), self.epoch.size, seed=self.data.seed)[0])
        number = int(np.searchsorted(self.epoch.ends, place, side="right"))
        epoch = batch // self.epoch.size if self.data.fresh else 0
        key = (_TRAINING, self.data.seed, epoch, place, self.rank)
        return self.data.batch(self.data.train_subsets[number], number, self.data.batch_size, *key)


class ValidationBatches(Dataset[dict[str, Any]]):
    """The validation subsets one after another."""

    def __init__(self, data: SyntheticDataModule) -> None:
        self.data = data
        self.places = [
            (number, first, min(data.batch_size, subset["examples"] - first))
            for number, subset in enumerate(data.val_subsets)
            for first in range(0, subset["examples"], data.batch_size)
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        number, first, count = self.places[batch]
        return self.data.batch(self.data.val_subsets[number], number, count, _VALIDATION, number, first)


def _shape(subset: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in subset.items() if name != "examples"}
