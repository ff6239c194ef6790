"""The DataModule of synthetic tasks, whose examples are sampled when a batch is requested."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lkda.checks import InputError, check_count, check_distinct
from lkda.data.datamodule import IndexedDataModule
from lkda.data.fingerprint import check_same, of_arrays, of_texts
from lkda.data.shuffle import shuffled
from lkda.targets import IGNORE_INDEX

Examples = tuple[np.ndarray, np.ndarray]  # tokens and targets [B, T] int64; IGNORE_INDEX where nothing is predicted
_TRAINING, _VALIDATION = 0, 1
FINGERPRINT_EXAMPLES = 16  # of each subset
_SHARES_OF_BATCH = 64  # see `_rounded`


class SyntheticDataModule(IndexedDataModule):
    """Trains on an unlimited mixture of subsets, each of one shape, and validates on separate subsets.

    A batch {tokens, targets [B, T] int64, cu_seqlens None, target_positions [N] int64, subset} holds examples of one
    subset. `target_positions` are the positions of the targets in the flattened batch; only these need logits. In
    training a position without a target may follow them, several times: see `_rounded`. `subset` is the index of the
    subset in its list. The content of batch n depends only on (seed, n). An epoch consists of the `examples` of each
    subset, split into batches, in an order of its own.

    Args:
        train, validation: subsets {"length", "examples", ...}. The other entries are arguments of the subclass's
            `sample`.
        vocab_size: number of rows of the model's embedding.
        batch_size: examples per batch and device.
        seed: of the training examples and their order. The validation examples are the same for every seed.
        fresh: whether every epoch has new examples. Otherwise every epoch has the batches of the first one, in another
            order.
        num_workers, pin_memory: see `IndexedDataModule`.

    Attributes:
        fingerprint_name: the earlier name of a task that was renamed, for its fingerprint; else None.
    Raises: InputError for a subset that cannot be sampled, or a count outside its range.
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
            raise InputError(
                "data.train and data.validation need at least one subset, as in [{length: 64, examples: 1000}]."
            )
        # The results of a subset are named by its shape, so that one of two with the same shape would be lost.
        check_distinct("data.validation", [_in_words(subset) for subset in self.val_subsets])
        self.source = type(self).__module__.rpartition(".")[2]
        self.context = max(subset["length"] for subset in self.train_subsets)

    def sample(self, *count_and_rng: Any, **shape: Any) -> Examples:
        """sample(count, rng, *, length, ...): `count` examples of a subset with these entries."""
        raise NotImplementedError

    def check(self, *_: Any, **shape: Any) -> None:
        """check(*, length, ...): raises InputError for a shape that cannot be sampled.

        The names of its arguments are those of the entries of a subset, beside "examples".
        """
        raise NotImplementedError

    def _checked(self, group: str, subset: Mapping[str, int]) -> dict[str, int]:
        if not isinstance(subset, Mapping):
            raise InputError(f"a subset of data.{group} must be like {{length: 64, examples: 1000}}, got {subset!r}.")
        plain = dict(subset)
        entries = (*inspect.signature(self.check).parameters, "examples")
        wrong = [f"{name} is missing" for name in entries if name not in plain]
        wrong += [f"{name} is none of them" for name in plain if name not in entries]
        if wrong:
            raise InputError(
                f"a subset of data.{group} must have the entries {', '.join(entries)}; {', '.join(wrong)} in {plain}."
            )
        for name, value in plain.items():
            check_count(f"{name} of a subset of data.{group}", value, least=1)
        self.check(**_shape(plain))
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

    def _fingerprint(self, subsets: Sequence[Mapping[str, int]], *description: Any) -> str:
        """A hash of `description` and of a few examples of each subset, which depend on every option of the sampling.

        The seed is left out: it only selects which examples of the same data a run uses.
        """
        sampled = [self.sample(FINGERPRINT_EXAMPLES, np.random.default_rng(0), **_shape(subset)) for subset in subsets]
        arrays = of_arrays(*(array for example in sampled for array in example))
        return of_texts([json.dumps([self.fingerprint_name or self.source, self.vocab_size, *description]), arrays])

    @property
    def tokens_per_batch(self) -> int:
        """The mean over an epoch, because subsets differ in length."""
        epoch = _Epoch(self.train_subsets, self.batch_size)
        total = sum(n * subset["length"] for n, subset in zip(epoch.batches, self.train_subsets, strict=True))
        return round(self.batch_size * total / epoch.size)

    def training_batches(self, *, rank: int, world_size: int) -> TrainingBatches:
        return TrainingBatches(self, rank=rank, world_size=world_size)

    def validation_batches(self) -> ValidationBatches:
        return ValidationBatches(self)

    def measured_subsets(self, limit: int | float | None) -> list[Mapping[str, int]]:
        """The validation subsets of which there is a batch among the first `limit`, or in that share of all batches.
        None means all of them."""
        batches = self.validation_batches()
        most = len(batches) if limit is None else limit if isinstance(limit, int) else int(limit * len(batches))
        return [subset for number, subset in enumerate(self.val_subsets) if batches.first_batch(number) < most]

    def batch(self, subset: Mapping[str, int], number: int, count: int, *key: int) -> dict[str, Any]:
        """A batch of `count` examples of `subset`, whose index is `number`. Every `key` gives other examples."""
        tokens, targets = self.sample(count, np.random.default_rng(key), **_shape(subset))
        target_positions = torch.from_numpy(np.flatnonzero(targets != IGNORE_INDEX))
        tensors: dict[str, Tensor | None] = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        return tensors | {"cu_seqlens": None, "target_positions": target_positions, "subset": number}


class _Epoch:
    """The number of batches of each subset in an epoch. Batches are numbered subset by subset."""

    def __init__(self, subsets: Sequence[Mapping[str, int]], batch_size: int) -> None:
        self.batches = [max(1, subset["examples"] // batch_size) for subset in subsets]
        self.ends = np.cumsum(self.batches)
        self.size = int(self.ends[-1])


class TrainingBatches(Dataset[dict[str, Any]]):
    """An unlimited sequence of training batches. Ranks sample different examples of the same subset."""

    def __init__(self, data: SyntheticDataModule, *, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size = data, rank, world_size
        self.epoch = _Epoch(data.train_subsets, data.batch_size)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        place = int(shuffled(np.array([batch]), self.epoch.size, seed=self.data.seed)[0])
        number = int(np.searchsorted(self.epoch.ends, place, side="right"))
        epoch = batch // self.epoch.size if self.data.fresh else 0
        key = (_TRAINING, self.data.seed, epoch, place, self.rank)
        found = self.data.batch(self.data.train_subsets[number], number, self.data.batch_size, *key)
        return found | {"target_positions": _rounded(found["target_positions"], found["targets"])}


class ValidationBatches(Dataset[dict[str, Any]]):
    """The batches of the validation subsets, one subset after another."""

    def __init__(self, data: SyntheticDataModule) -> None:
        self.data = data
        self.ends = np.cumsum([-(-subset["examples"] // data.batch_size) for subset in data.val_subsets])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, batch: int) -> dict[str, Any]:
        if not 0 <= batch < len(self):
            raise IndexError(batch)
        number = int(np.searchsorted(self.ends, batch, side="right"))
        subset, size = self.data.val_subsets[number], self.data.batch_size
        first = size * (batch - self.first_batch(number))
        return self.data.batch(subset, number, min(size, subset["examples"] - first), _VALIDATION, number, first)

    def first_batch(self, subset: int) -> int:
        """The number of the first batch of a subset."""
        return int(self.ends[subset - 1]) if subset else 0


def _rounded(positions: Tensor, targets: Tensor) -> Tensor:
    """`positions` [N], then one position without a target, repeated until their number is a multiple of 1/64 of the
    tokens of `targets` [B, T].

    The number of targets differs from batch to batch in some tasks, and each number needs a CUDA graph of its own. This
    leaves a few numbers. A position without a target changes no loss.
    """
    flat = targets.flatten()
    size = max(1, len(flat) // _SHARES_OF_BATCH)
    more = min(-len(positions) % size, len(flat) - len(positions))
    if not more:
        return positions
    without = (flat == IGNORE_INDEX).nonzero()[0]
    return torch.cat([positions, without.expand(more)])


def _shape(subset: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in subset.items() if name != "examples"}


def _in_words(subset: Mapping[str, int]) -> str:
    return "a subset of " + ", ".join(f"{name} {value}" for name, value in sorted(_shape(subset).items()))
