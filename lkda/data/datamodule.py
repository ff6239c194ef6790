"""The base DataModule of data whose batch n depends only on n."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import lightning as L
import torch
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, get_worker_info

from lkda.checks import InputError, check_count
from lkda.data.fingerprint import Fingerprint
from lkda.data.text_sources import TextSource

MOST_WORKERS = 256


class Numbered(Protocol):
    """An unlimited sequence of batches that is indexed by number."""

    def __getitem__(self, batch: int) -> dict[str, Any]: ...


class CountUp(IterableDataset[dict[str, Any]]):
    """Batches start, start + 1, ... in this order, with any number of workers."""

    def __init__(self, batches: Numbered, start: int) -> None:
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        # A DataLoader reads from its workers in turn.
        n, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.batches[n]
            n += stride


class Shared(Dataset[dict[str, Any]]):
    """The share that a process takes of each of `batches`."""

    def __init__(self, batches: Any, share: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.batches, self.share = batches, share

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, batch: int) -> dict[str, Any]:
        return self.share(self.batches[batch])


@dataclass(frozen=True)
class TestSplit:
    """The test split. It is measured once, at the end of a run, and is never used to choose settings.

    Attributes:
        batches: all batches, with a length.
        tokens: the number of tokens of the text.
        bytes_per_token, unigram_entropy: as in `IndexedDataModule`, for the test text.
        sources: of the test text, as `val_sources`.
    """

    __test__ = False  # pytest would take a class of this name for a test

    batches: Dataset[Any]
    tokens: int | None = None
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None
    sources: Sequence[TextSource] = ()


class IndexedDataModule(L.LightningDataModule):
    """Trains on an unlimited sequence of batches from `start_batch` on, and validates on a fixed list of batches.

    A subclass defines `prepare`, `training_batches` and `validation_batches`. The position in the training data is
    derived from the trainer's steps, not from what a loader has fetched, and it is saved in checkpoints.
    `fit(ckpt_path=...)` therefore continues with exactly the next batch.

    Attributes, after `prepare`:
        source: the name of the data.
        vocab_size: the number of embedding rows that the data need.
        context: tokens of the longest training sequence.
        batch_size: sequences per batch, of all devices together.
        share: takes the share of this process from a batch. Each process reads all batches, of training and validation,
            and trains on its share; see `lkda.training.shares`. None means the whole batch.
        val_batches: the number of validation batches.
        tokenizer: of text; None for other data.
        bytes_per_token, unigram_entropy: of the validation text, in bytes per token and nats per token; None for other
            data.
        val_sources: the sources of the validation text, in order; empty if they are not known.
        test: the test split; None if there is none.
        no_test: the reason why text has no test split, in words.
        left_out: which of the training data are not trained on, in words; None if nearly all are.
        val_subsets: for data that are not text, the properties of each validation subset, such as {"length": 256,
            "pairs": 64}. The "subset" of a validation batch is an index into this list. Empty for text.
        fingerprint: hashes of the content, see `lkda.data.fingerprint`.

    To resume a run, set `expected` to its fingerprint before `prepare`. The data must have this fingerprint.

    Args:
        num_workers: processes that make training batches. 0 means the training process itself.
        pin_memory: whether to put batches into pinned memory. None means yes if there is a GPU.
    """

    source: str
    vocab_size: int
    context: int
    batch_size: int
    share: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    val_batches: int
    tokenizer: Tokenizer | None = None
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None
    val_sources: Sequence[TextSource] = ()
    test: TestSplit | None = None
    no_test: str | None = None
    left_out: str | None = None
    val_subsets: Sequence[Mapping[str, int]] = ()
    fingerprint: Fingerprint = MappingProxyType({})
    expected: Fingerprint = MappingProxyType({})

    def __init__(self, *, num_workers: int = 0, pin_memory: bool | None = None) -> None:
        super().__init__()
        check_count("data.num_workers", num_workers, least=0)
        if num_workers > MOST_WORKERS:
            raise InputError(f"data.num_workers must be at most {MOST_WORKERS}, got {num_workers}: each is a process.")
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.start_batch = 0

    def prepare(self) -> None:
        """Check the options and the data, and build what the batches need. A second call does nothing.

        Raises: InputError for data that cannot be used, or that are not the expected ones.
        """
        raise NotImplementedError

    def training_batches(self, *, rank: int, world_size: int) -> Numbered:
        """The training batches of one of `world_size` data-parallel processes."""
        raise NotImplementedError

    def validation_batches(self) -> Dataset[Any]:
        """All validation batches, with a length. They are the same on every process."""
        raise NotImplementedError

    @property
    def tokens_per_batch(self) -> int:
        """The number of tokens of a training batch on all devices. It is the mean if batches differ."""
        return self.batch_size * self.context

    def setup(self, stage: str) -> None:
        self.prepare()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training batches, from `start_batch` on, without an end."""
        batches = CountUp(self._shared(self.training_batches(rank=0, world_size=1)), self.start_batch)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation batches from the first, in order."""
        return self.in_order(self.validation_batches())

    def in_order(self, batches: Dataset[Any]) -> DataLoader[Any]:
        """A loader of all `batches` in order. On every process it gives the process's share of each."""
        batches = self._shared(batches)
        # With any other sampler, Lightning would distribute the batches among the devices, some of them twice.
        sampler: DistributedSampler[Any] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(batches, batch_size=None, sampler=sampler, pin_memory=self.pin_memory)

    def _shared(self, batches: Any) -> Any:
        return batches if self.share is None else Shared(batches, self.share)

    def state_dict(self) -> dict[str, int]:
        """The number of the next training batch."""
        if self.trainer is None:
            return {"start_batch": self.start_batch}
        return {"start_batch": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start_batch = state_dict["start_batch"]
