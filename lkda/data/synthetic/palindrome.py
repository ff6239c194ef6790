"""Reversing a random string, as in the Kimi Linear report (arXiv:2510.26692, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lkda.checks import InputError, check_count
from lkda.data.synthetic.by_length import LengthTask
from lkda.data.synthetic.datamodule import Examples
from lkda.targets import IGNORE_INDEX

SEPARATOR = 0
LETTERS_FROM = 1


class Palindrome(LengthTask):
    """A string of n random letters, a separator, and the string reversed. Every letter of the reversed string is a
    target.

        tokens   a b c | c b        targets  - - - c b a        (length 2 n)

    Args:
        letters: size of the alphabet. The vocabulary has one token more, the separator.
        context, val_lengths: even numbers of tokens.
        val_examples, batch_size, seed, num_workers, pin_memory: see `LengthTask`.
    """

    def __init__(
        self,
        *,
        context: int = 256,
        val_lengths: Sequence[int] | None = None,
        val_examples: int = 512,
        letters: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        check_count("data.letters", letters, least=1)
        super().__init__(
            context=context,
            val_lengths=val_lengths,
            val_examples=val_examples,
            vocab_size=LETTERS_FROM + letters,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def check(self, *, length: int) -> None:
        if length % 2:
            raise InputError(
                f"a palindrome needs an even length, got {length}: change data.context or data.val_lengths."
            )

    def sample(self, count: int, rng: np.random.Generator, *, length: int) -> Examples:
        half = length // 2
        string = rng.integers(LETTERS_FROM, self.vocab_size, (count, half))
        backwards = string[:, ::-1]
        separator = np.full((count, 1), SEPARATOR)
        tokens = np.concatenate([string, separator, backwards[:, :-1]], axis=1)
        return tokens, np.concatenate([np.full((count, half), IGNORE_INDEX), backwards], axis=1)
