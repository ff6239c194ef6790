"""Tasks of one length: trained at it, and validated at it or at several."""

from __future__ import annotations

from collections.abc import Sequence

from lkda.data.synthetic.datamodule import SyntheticDataModule


class LengthTask(SyntheticDataModule):
    """A synthetic task whose examples differ in their length alone; every training batch is new.

    Args:
        context: length trained at.
        val_lengths: validated at; where None, `context` alone.
        val_examples: of each of these lengths.
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
