"""Whether the sequences of a synthetic task fit into the memory. Their length is any number that the user gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lkda.checks import InputError
from lkda.data.datamodule import IndexedDataModule
from lkda.data.synthetic.datamodule import FINGERPRINT_EXAMPLES, SyntheticDataModule

_BYTES_OF_TOKEN = 16  # a token and a target, int64


@dataclass(frozen=True)
class _Held:
    """Sequences that are in the memory at the same time.

    Attributes:
        group: of their subset, train or validation.
    """

    group: str
    length: int
    sequences: int
    bytes_of_token: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.length * self.sequences * self.bytes_of_token


def check_sequence_memory(
    data: IndexedDataModule,
    options: Mapping[str, Any],
    *,
    width: int,
    device: torch.device,
    limit: int | float | None,
    available: int,
) -> None:
    """Raise InputError if the memory cannot hold the sequences that are sampled at once, or on a CPU what the model
    computes for a validation batch. Both are lower bounds. For data that are not sampled this does nothing.

    Args:
        data: not yet prepared.
        options: of the data, for the message.
        width: of the model.
        limit: how many validation batches are measured, or which share of them; None means all.
        available: bytes.
    """
    if not isinstance(data, SyntheticDataModule):
        return
    largest = max(_held(data, width=width if device.type == "cpu" else 0, limit=limit), key=lambda held: held.size)
    if largest.size > available:
        batch_size = " or data.batch_size" if largest.sequences > FINGERPRINT_EXAMPLES else ""
        raise InputError(
            f"sequences of {largest.length:,} tokens, {largest.sequences} at a time, need more than "
            f"{largest.size / 2**30:,.0f} GiB of memory, and the machine has {available / 2**30:,.0f} GiB: "
            f"lower {_length_option(largest.group, options)}{batch_size}."
        )


def _length_option(group: str, options: Mapping[str, Any]) -> str:
    if group in options:
        return f"the length in data.{group}"
    return "data.val_lengths" if group == "validation" and options.get("val_lengths") else "data.context"


def _held(data: SyntheticDataModule, *, width: int, limit: int | float | None) -> Iterator[_Held]:
    """The measured batches, and the examples of which the fingerprint is made."""
    for subset in data.measured_subsets(limit):
        batch = min(data.batch_size, subset["examples"])
        # The model's output is in float32.
        yield _Held("validation", subset["length"], batch, _BYTES_OF_TOKEN + 4 * width)
    for group, subsets in (("train", data.train_subsets), ("validation", data.val_subsets)):
        for subset in subsets:
            yield _Held(group, subset["length"], FINGERPRINT_EXAMPLES, _BYTES_OF_TOKEN)
