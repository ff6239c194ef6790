"""Synthetic tasks that are trained at one length, and validated at the same length or at several lengths."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.data.synthetic.datamodule import SyntheticDataModule


class LengthTask(SyntheticDataModule):
    """A synthetic task whose subsets differ only in length. Every training batch has new examples.

    Args:
        context: training length in tokens.
        val_lengths: validation lengths in tokens. None means only `context`.
        val_examples: validation examples of each length.
        vocab_size, batch_size, seed, num_workers, pin_memory: see `SyntheticDataModule`.
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
        super().__init__(
            train=[{"length": context, "examples": batch_size}],
            validation=[{"length": length, "examples": val_examples} for length in val_lengths or [context]],
            vocab_size=vocab_size,
            batch_size=batch_size,
            seed=seed,
            fresh=True,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
