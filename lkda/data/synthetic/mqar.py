"""Multi-query associative recall (MQAR) as sampled by Zoology (arXiv:2312.04927)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lkda.checks import InputError
from lkda.data.synthetic.datamodule import Examples, SyntheticDataModule
from lkda.data.synthetic.sampling import distinct, weighted
from lkda.targets import IGNORE_INDEX

# Larger exponents overflow in float64.
MOST_POWER = 20


class MQAR(SyntheticDataModule):
    """Pairs of a key and a value, then each key once, with its value as the target. All other tokens are random.

        tokens   k1 v1 k2 v2  r  r k2  r k1  r        targets  -  -  -  -  -  - v2  - v1  -

    Keys are sampled from the lower half of the vocabulary without 0, values from the upper half, each without
    replacement. A key is queried at an even offset 2 g from the end of the pairs. The g are sampled without replacement
    with p(g) ~ (g + 1)^(power - 1), so that most keys are queried early and some late.

    Args:
        train, validation: subsets {"length", "pairs", "examples"} with 4 pairs <= length.
        power: exponent of the distribution of g, from -20 to 20.
        vocab_size, batch_size, seed, fresh, num_workers, pin_memory: see `SyntheticDataModule`.
    """

    def __init__(
        self,
        *,
        train: Sequence[Mapping[str, int]],
        validation: Sequence[Mapping[str, int]],
        vocab_size: int = 8192,
        power: float = 0.01,
        batch_size: int = 256,
        seed: int = 0,
        fresh: bool = True,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        if not abs(power) <= MOST_POWER:
            raise InputError(f"data.power must be from -{MOST_POWER} to {MOST_POWER}, got {power!r}.")
        self.power, self.keys_below = power, vocab_size // 2
        super().__init__(
            train=train,
            validation=validation,
            vocab_size=vocab_size,
            batch_size=batch_size,
            seed=seed,
            fresh=fresh,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def check(self, *, length: int, pairs: int) -> None:
        if 4 * pairs > length:
            raise InputError(
                f"mqar needs 4 tokens of length per pair, got length {length} and {pairs} pairs: "
                f"give at most {length // 4} pairs."
            )
        if pairs > self.keys_below - 1:
            raise InputError(
                f"mqar samples {pairs} different keys from [1, {self.keys_below}): set data.vocab_size to "
                f"{2 * (pairs + 1)} or more."
            )

    def sample(self, count: int, rng: np.random.Generator, *, length: int, pairs: int) -> Examples:
        keys = distinct(rng, count, pairs, low=1, high=self.keys_below)
        values = distinct(rng, count, pairs, low=self.keys_below, high=self.vocab_size)
        places = np.arange(1, (length - 2 * pairs) // 2 + 1, dtype=np.float64)
        queries = 2 * pairs + 2 * weighted(rng, count, pairs, places ** (self.power - 1))
        tokens = rng.integers(self.vocab_size, size=(count, length))
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        np.put_along_axis(tokens, queries, keys, axis=1)
        targets = np.full_like(tokens, IGNORE_INDEX)
        np.put_along_axis(targets, queries, values, axis=1)
        return tokens, targets
