"""Multi-query associative recall as in the Kimi Linear report (arXiv:2510.26692, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lkda.checks import InputError
from lkda.data.synthetic.by_length import LengthTask
from lkda.data.synthetic.datamodule import Examples
from lkda.data.synthetic.sampling import distinct
from lkda.targets import IGNORE_INDEX

SEPARATOR = 0


class ConsecutiveMQAR(LengthTask):
    """Pairs of a key and a value, a separator, then each key once in random order. The target at a key is its value.

        tokens   k1 v1 k2 v2 | k2 k1        targets  -  -  -  - - v2 v1        (length 3 pairs + 1)

    The queries directly follow one another. The answers are not part of the tokens, and no token is noise. There are
    (length - 1) // 3 pairs. If one or two tokens are left over, the separator is repeated. Keys are distinct and are
    sampled from the lower half of the vocabulary without 0. Values are sampled from the upper half and may repeat.

    Args:
        vocab_size: the number of keys and values, including the separator 0.
        context, val_lengths: at least 4 tokens.
        val_examples, batch_size, seed, num_workers, pin_memory: see `LengthTask`.
    """

    def __init__(
        self,
        *,
        context: int = 256,
        val_lengths: Sequence[int] | None = None,
        val_examples: int = 512,
        vocab_size: int = 8192,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        self.keys_below = vocab_size // 2
        super().__init__(
            context=context,
            val_lengths=val_lengths,
            val_examples=val_examples,
            vocab_size=vocab_size,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def check(self, *, length: int) -> None:
        if length < 4:
            raise InputError(
                f"mqar_kimi needs a length of 4 tokens or more (a pair, a separator and a query), got {length}."
            )
        pairs = _pairs(length)
        if pairs > self.keys_below - 1:
            raise InputError(
                f"mqar_kimi needs {pairs} different keys, which do not fit into [1, {self.keys_below}): set "
                f"data.vocab_size to {2 * (pairs + 1)} or more."
            )

    def sample(self, count: int, rng: np.random.Generator, *, length: int) -> Examples:
        pairs = _pairs(length)
        keys = distinct(rng, count, pairs, low=1, high=self.keys_below)
        values = rng.integers(self.keys_below, self.vocab_size, (count, pairs))
        order = np.argsort(rng.random((count, pairs)), axis=1)
        tokens = np.full((count, length), SEPARATOR)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        tokens[:, -pairs:] = np.take_along_axis(keys, order, axis=1)
        targets = np.full((count, length), IGNORE_INDEX)
        targets[:, -pairs:] = np.take_along_axis(values, order, axis=1)
        return tokens, targets


def _pairs(length: int) -> int:
    return (length - 1) // 3
