"""Synthetic tasks that are trained at one length, and validated at the same length or at several lengths."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.checks import InputError, check_count, check_distinct
from lkda.data.synthetic.datamodule import SyntheticDataModule


class LengthTask(SyntheticDataModule):
    """A synthetic task whose subsets differ only in length. Every training batch has new examples.

    Args:
        context: training length in tokens.
        val_lengths: validation lengths in tokens. None means only `context`.
        val_examples: validation examples of each length.
        vocab_size, batch_size, seed, num_workers, pin_memory: see `SyntheticDataModule`.
    Raises: InputError for a length that is given twice, or a count outside its range.
    """

    def __init__(
        self,
        *,
        context: int,
        val_lengths: Sequence[int] | None,
        val_examples: int,
        vocab_size: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        pin_memory: bool | None,
    ) -> None:
        lengths = [context] if val_lengths is None else val_lengths
        for name, values in {"context": [context], "val_examples": [val_examples], "val_lengths": lengths}.items():
            for value in values:
                check_count(f"data.{name}", value, least=1)
        if not lengths:
            raise InputError("data.val_lengths is empty: give some lengths, or leave it out for data.context alone.")
        check_distinct("data.val_lengths", lengths)
        super().__init__(
            train=[{"length": context, "examples": batch_size}],
            validation=[{"length": length, "examples": val_examples} for length in lengths],
            vocab_size=vocab_size,
            batch_size=batch_size,
            seed=seed,
            fresh=True,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
