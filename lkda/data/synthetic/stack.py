"""Pushes and pops on many stacks, as in the Kimi Linear report (arXiv:2510.26692, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lkda.checks import InputError, check_count
from lkda.data.synthetic.by_length import LengthTask
from lkda.data.synthetic.datamodule import Examples
from lkda.targets import IGNORE_INDEX

PUSH, POP, STACKS_FROM = 0, 1, 2


class Stack(LengthTask):
    """Operations of three tokens: PUSH or POP, a stack, an element. A popped element is the target at its stack's
    token.

        tokens   PUSH 3 a PUSH 7 b PUSH 3 c POP 3 c POP 3 a        targets  ... - c - - a -

    With probability `pop` an operation pops from a random stack that is not empty. Otherwise, or if all stacks are
    empty, it pushes a random element onto a random stack. The second operation always pops, so that every example has a
    target. If the length is not a multiple of 3, the last operation is cut off.

    Args:
        stacks, elements: the numbers of stacks and of different elements.
        pop: probability of a pop, in (0, 1).
        context, val_lengths: at least 6 tokens, so that something can be popped.
        val_examples, batch_size, seed, num_workers, pin_memory: see `LengthTask`.
    """

    def __init__(
        self,
        *,
        context: int = 256,
        val_lengths: Sequence[int] | None = None,
        val_examples: int = 512,
        stacks: int = 64,
        elements: int = 64,
        pop: float = 0.5,
        batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
    ) -> None:
        if not 0 < pop < 1:
            raise InputError(f"data.pop must be between 0 and 1, got {pop}.")
        check_count("data.stacks", stacks, least=1)
        check_count("data.elements", elements, least=1)
        self.stacks, self.elements, self.pop = stacks, elements, pop
        super().__init__(
            context=context,
            val_lengths=val_lengths,
            val_examples=val_examples,
            vocab_size=STACKS_FROM + stacks + elements,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )

    def check(self, *, length: int) -> None:
        if length < 6:
            raise InputError(f"stack needs a length of 6 tokens or more (a push and a pop), got {length}.")

    def sample(self, count: int, rng: np.random.Generator, *, length: int) -> Examples:
        operations = -(-length // 3)
        elements = rng.integers(self.elements, size=(count, operations))
        wants_pop = rng.random((count, operations)) < self.pop
        wants_pop[:, 1] = True
        chosen = np.empty((count, operations), dtype=np.int64)
        popped = np.empty((count, operations), dtype=bool)
        # Each stack is a linked list of the operations that pushed: `top` is the last one, `below` the one under each.
        top = np.full((count, self.stacks), -1)
        below = np.full((count, operations), -1)
        rows = np.arange(count)
        for n in range(operations):
            full = top >= 0
            popped[:, n] = pops = wants_pop[:, n] & full.any(1)
            scores = rng.random((count, self.stacks), dtype=np.float32)
            chosen[:, n] = stack = np.argmax(scores + (full & pops[:, None]), axis=1)
            last = top[rows, stack]
            elements[:, n] = np.where(pops, elements[rows, last], elements[:, n])
            below[:, n] = last
            top[rows, stack] = np.where(pops, below[rows, last], n)
        parts = np.where(popped, POP, PUSH), STACKS_FROM + chosen, STACKS_FROM + self.stacks + elements
        tokens = np.stack(parts, axis=2)
        targets = np.full_like(tokens, IGNORE_INDEX)
        targets[..., 1] = np.where(popped, tokens[..., 2], IGNORE_INDEX)
        return tokens.reshape(count, -1)[:, :length], targets.reshape(count, -1)[:, :length]
