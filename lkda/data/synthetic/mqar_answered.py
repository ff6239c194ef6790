"""Multi-query associative recall in which each query is followed by its answer."""

from __future__ import annotations

import numpy as np

from lkda.checks import InputError
from lkda.data.synthetic.datamodule import Examples
from lkda.data.synthetic.mqar_kimi import SEPARATOR, ConsecutiveMQAR
from lkda.data.synthetic.sampling import distinct
from lkda.targets import IGNORE_INDEX


class AnsweredMQAR(ConsecutiveMQAR):
    """Pairs of a key and a value, a separator, then each key once in random order, followed by its value.

        tokens   k1 v1 k2 v2 | k2 v2 k1        targets  -  -  -  - - v2  - v1        (length 4 pairs)

    There are length / 4 pairs, and no token is noise. Keys are distinct and are sampled from the lower half of the
    vocabulary without 0. Values are sampled from the upper half and may repeat.

    In contrast to `mqar_kimi`, the answers are part of the tokens, so that each pair occurs twice.

    Args:
        vocab_size: the number of keys and values, including the separator 0.
        context, val_lengths: multiples of 4 tokens.
        val_examples, batch_size, seed, num_workers, pin_memory: see `LengthTask`.
    """

    fingerprint_name = "mqar_kimi"  # its name in earlier versions, so that their runs can be resumed

    def check(self, *, length: int) -> None:
        if length % 4:
            raise InputError(
                f"mqar_answered needs a length that is a multiple of 4 tokens, got {length}: change data.context or "
                "data.val_lengths."
            )
        if length // 4 > self.keys_below - 1:
            raise InputError(
                f"mqar_answered needs {length // 4} different keys, which do not fit into [1, {self.keys_below}): set "
                "data.vocab_size to "
                f"{length // 2 + 2} or more."
            )

    def sample(self, count: int, rng: np.random.Generator, *, length: int) -> Examples:
        pairs = length // 4
        keys = distinct(rng, count, pairs, low=1, high=self.keys_below)
        values = rng.integers(self.keys_below, self.vocab_size, (count, pairs))
        order = np.argsort(rng.random((count, pairs)), axis=1)
        queries, answers = np.take_along_axis(keys, order, axis=1), np.take_along_axis(values, order, axis=1)
        tokens = np.full((count, length + 1), SEPARATOR)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        tokens[:, 2 * pairs + 1 :: 2], tokens[:, 2 * pairs + 2 :: 2] = queries, answers
        targets = np.full((count, length), IGNORE_INDEX)
        targets[:, 2 * pairs + 1 :: 2] = answers
        return tokens[:, :-1], targets
