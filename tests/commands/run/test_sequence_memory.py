"""Sequences of a synthetic task that are too long for the memory are refused before any is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.run.sequence_memory import check_sequence_memory
from lkda.data.datamodule import IndexedDataModule
from lkda.data.random_tokens import RandomTokens
from lkda.data.synthetic.mqar import MQAR
from lkda.data.synthetic.palindrome import Palindrome

SHORT = {"length": 64, "pairs": 4, "examples": 20}
LONG = {**SHORT, "length": 10**9}
GIB = 2**30


def check(data: IndexedDataModule, *, device: str = "cuda", limit: float | None = None, available: int = GIB) -> None:
    options: dict[str, Any] = {"train": [], "validation": []} if isinstance(data, MQAR) else {}
    if isinstance(data, Palindrome) and len(data.val_subsets) > 1:
        options["val_lengths"] = [subset["length"] for subset in data.val_subsets]
    check_sequence_memory(data, options, width=128, device=torch.device(device), limit=limit, available=available)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Palindrome(val_lengths=[64, 10**9]),
            r"sequences of 1,000,000,000 tokens, 64 at a time, .* 954 GiB.*: lower data.val_len",
        ),
        (
            Palindrome(context=10**8, batch_size=1),
            r"of 100,000,000 tokens, 16 at a time, .* 24 GiB.* 1 GiB: lower data.context\.$",
        ),
        (MQAR(train=[SHORT], validation=[SHORT, LONG]), r"lower the length in data.validation"),
        (MQAR(train=[LONG], validation=[SHORT]), r"lower the length in data.train\.$"),
    ],
)
def test_the_option_to_lower_is_named(data: IndexedDataModule, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(data)


def test_on_a_cpu_the_model_counts_too() -> None:
    """A token is 16 bytes, and on a CPU 512 bytes of the model's output more."""
    data, needed = Palindrome(val_lengths=[64, 10**6], val_examples=64), 64 * 10**6 * 16
    check(data, available=needed)
    with pytest.raises(
        InputError, match=r"sequences of 1,000,000 tokens, 64 at a time, .*: lower data.val_lengths or data.batch_size"
    ):
        check(data, available=needed - 1)
    check(data, device="cpu", available=33 * needed)
    with pytest.raises(InputError, match="sequences of 1,000,000 tokens, 64 at a time"):
        check(data, device="cpu", available=33 * needed - 1)


@pytest.mark.parametrize(("limit", "refused"), [(1, False), (0.5, False), (2, True), (1.0, True), (None, True)])
def test_only_measured_batches_count(limit: float | None, refused: bool) -> None:
    """Of the two batches, the first is short. A few examples of the long one are sampled in any case."""
    data = Palindrome(val_lengths=[64, 10**6], val_examples=64)
    if refused:
        with pytest.raises(InputError, match="1,000,000 tokens"):
            check(data, limit=limit, available=64 * 10**6 * 16 - 1)
    else:
        check(data, limit=limit, available=16 * 10**6 * 16)


def test_other_data_are_left_to_their_own_checks() -> None:
    check(RandomTokens(vocab_size=8, context=10**9))
