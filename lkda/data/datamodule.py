"""The DataModule of everything whose batches are functions of their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import lightning as L
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from lkda.checks import InputError
from lkda.data.fingerprint import Fingerprint

MOST_WORKERS = 256


class Numbered(Protocol):
    """Batches by number, without an end."""

    def __getitem__(self, batch: int) -> dict[str, Any]: ...


class CountUp(IterableDataset[dict[str, Any]]):
    """Batches start, start + 1, ..., in this order with any number of workers."""

    def __init__(self, batches: Numbered, start: int) -> None:
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        # A DataLoader asks its workers in turn.
        n, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.batches[n]
            n += stride


@dataclass(frozen=True)
class TestSplit:
    """What is measured once, at the end, and chosen by never.

    Attributes:
        batches: all of them, with a length.
        tokens: of the text.
        bytes_per_token, unigram_entropy: as of `IndexedDataModule`, of this text.
    """

    __test__ = False  # of pytest, which takes a class of this name for a test

    batches: Dataset[Any]
    tokens: int | None = None
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None


class IndexedDataModule(L.LightningDataModule):
    """Trains on an unlimited sequence of batches from `start_batch` on, and validates on a fixed list of batches.

    A subclass gives `prepare`, `training_batches` and `validation_batches`. How far training has come is counted by the
    trainer's steps, never by what a loader has fetched, and a checkpoint holds it: `fit(ckpt_path=...)` goes on with
    exactly the next batch.

    Attributes, after `prepare`:
        source: the name of the data. vocab_size: rows that an embedding needs. context: tokens of the longest training
            sequence. batch_size: sequences a batch and device. val_batches: their number.
        tokenizer, bytes_per_token, unigram_entropy: of data whose tokens are text (bytes, and nats a token, of what
            validates); None of any other.
        test: None where the data have no test split.
        no_test: why a text has none, in words.
        val_subsets: for other data, what each subset of the validation is like, as {"length": 256, "pairs": 64}. The
            "subset" of a validation batch is an index into it. Empty where the validation is one text.
        fingerprint: hashes of the content, see `lkda.data.fingerprint`.

    Set `expected` before `prepare` to go on with a run: its fingerprint, which the data must have.

    Args:
        num_workers: processes that make training batches; 0: the training process does.
        pin_memory: hand batches over in pinned memory; where None, if there is a GPU.
    """

    source: str
    vocab_size: int
    context: int
    batch_size: int
    val_batches: int
    tokenizer: Tokenizer | None = None
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None
    test: TestSplit | None = None
    no_test: str | None = None
    val_subsets: Sequence[Mapping[str, int]] = ()
    fingerprint: Fingerprint = MappingProxyType({})
    expected: Fingerprint = MappingProxyType({})

    def __init__(self, *, num_workers: int = 0, pin_memory: bool | None = None) -> None:
        super().__init__()
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
            raise InputError(f"data.num_workers must be a whole number of 0 or more, got {num_workers!r}.")
        if num_workers > MOST_WORKERS:
            raise InputError(f"data.num_workers must be at most {MOST_WORKERS}, got {num_workers}: each is a process.")
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.start_batch = 0

    def prepare(self) -> None:
        """Checks the options and the data, and builds what the batches need. A second call does nothing.

        Raises: InputError for data that will not do, or that are not the expected ones.
        """
        raise NotImplementedError

    def training_batches(self, *, rank: int, world_size: int) -> Numbered:
        """Of one of `world_size` data-parallel processes."""
        raise NotImplementedError

    def validation_batches(self) -> Dataset[Any]:
        """All of them, on every process, with a length."""
        raise NotImplementedError

    @property
    def tokens_per_batch(self) -> int:
        """Of a training batch on one device; the mean where they differ."""
        return self.batch_size * self.context

    def setup(self, stage: str) -> None:
        self.prepare()

    def train_dataloader(self) -> DataLoader[Any]:
        """From batch `start_batch` on, without an end."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = CountUp(self.training_batches(rank=rank, world_size=world_size), self.start_batch)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation batches from the first, in order."""
        return self.in_order(self.validation_batches())

    def in_order(self, batches: Dataset[Any]) -> DataLoader[Any]:
        """Such batches from the first, on every process."""
        # Lightning would give any other sampler's batches out among the devices, some of them twice.
        sampler: DistributedSampler[Any] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(batches, batch_size=None, sampler=sampler, pin_memory=self.pin_memory)

    def state_dict(self) -> dict[str, int]:
        """The next training batch."""
        if self.trainer is None:
            return {"start_batch": self.start_batch}
        return {"start_batch": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start_batch = state_dict["start_batch"]
