"""Tokenized examples of a prompt and a completion, in a file each split, and the rows that are packed from them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer

from lkda.checks import InputError
from lkda.data.text.token_file import writing_token_file
from lkda.data.text.tokenizer import document_start, encode_texts, unknown_token, vocabulary_rows
from lkda.targets import IGNORE_INDEX

_AT_ONCE = 1024  # examples that are tokenized at a time


@dataclass(frozen=True)
class Examples:
    """Examples, each of which is [begin token, prompt, completion, end token].

    Attributes:
        token_ids: [N], of all examples, one after another.
        starts: int64 [count + 1], where each example begins, and the end.
        answers: int64 [count], where each completion begins.
    """

    token_ids: np.ndarray
    starts: np.ndarray
    answers: np.ndarray

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted: those of the completions, and the tokens that end them."""
        return int((self.starts[1:] - self.answers).sum())

    def predicted_tokens(self) -> np.ndarray:
        """The tokens that are predicted, in order."""
        edges = np.zeros(len(self.token_ids) + 1, dtype=np.int8)
        np.add.at(edges, self.answers, 1)
        np.add.at(edges, self.starts[1:], -1)
        return self.token_ids[np.cumsum(edges[:-1], dtype=np.int8) > 0]


def write_examples(
    directory: Path, name: str, pairs: Iterable[tuple[str, str]], *, tokenizer: Tokenizer, progress: Progress
) -> int:
    """Write the examples `name` of (prompt, completion) pairs. Returns the UTF-8 bytes of the completions.

    The prompt and the completion are tokenized separately, so that the loss on the completion begins at its first
    token.

    Raises: InputError for a tokenizer without a token that ends a document, or text that it cannot encode.
    """
    end = document_start(tokenizer)
    if end is None:
        raise InputError("the tokenizer has no token that ends a document, such as <|endoftext|>: give another one.")
    dtype = np.dtype(np.uint16 if vocabulary_rows(tokenizer) <= 2**16 else np.uint32)
    starts, answers, size, remaining = array("q", [0]), array("q"), 0, iter(pairs)
    task = progress.add_task(f"tokenizing {name}", total=None)
    with writing_token_file(directory / f"{name}.npy", dtype) as write:
        while batch := list(islice(remaining, _AT_ONCE)):
            prompts, completions = (
                _encoded(tokenizer, [pair[side] for pair in batch], ("prompt", "completion")[side]) for side in (0, 1)
            )
            for prompt, completion in zip(prompts, completions):
                answers.append(starts[-1] + 1 + len(prompt))
                starts.append(answers[-1] + len(completion) + 1)
                write(np.array([end, *prompt, *completion, end], dtype=dtype))
            size += sum(len(completion.encode()) for _, completion in batch)
            progress.update(task, description=f"tokenizing {name}: {len(answers):,} examples")
    np.save(directory / f"{name}_starts.npy", np.frombuffer(starts, dtype=np.int64))
    np.save(directory / f"{name}_answers.npy", np.frombuffer(answers, dtype=np.int64))
    progress.remove_task(task)
    return size


def _encoded(tokenizer: Tokenizer, texts: list[str], what: str) -> list[list[int]]:
    unknown = unknown_token(tokenizer)
    found: list[list[int]] = []
    for text, encoding in zip(texts, encode_texts(tokenizer, texts)):
        if unknown in encoding.ids or (text.strip() and not encoding.ids):
            raise InputError(
                f"the tokenizer of data.tokenizer_path has no token for a part of the {what} {text[:40]!r}: give a "
                "tokenizer that has every byte, or leave data.tokenizer_path out."
            )
        found.append(encoding.ids)
    return found


def read_examples(directory: Path, name: str) -> Examples:
    """The examples that `write_examples` wrote. The tokens are memory-mapped."""
    starts, answers = (np.load(directory / f"{name}_{part}.npy") for part in ("starts", "answers"))
    return Examples(np.load(directory / f"{name}.npy", mmap_mode="r"), starts, answers)


class ExampleRows:
    """Rows of whole examples, as many as fit, in the order of the examples. The rest of a row is padding without
    targets.

    Args:
        examples: the examples.
        numbers: the examples to use. An example of L tokens takes L - 1 places; it must fit into a row.
        context: tokens per row.
    """

    def __init__(self, examples: Examples, numbers: np.ndarray, *, context: int) -> None:
        self.examples, self.numbers, self.context = examples, numbers, context
        places = (np.diff(examples.starts)[numbers] - 1).tolist()
        firsts, left = [], 0
        for number, size in enumerate(places):
            if size > left:
                firsts.append(number)
                left = context
            left -= size
        self.firsts = np.array([*firsts, len(numbers)], dtype=np.int64)
        self.count = len(firsts)
        # One more, because the padding at the end of a row is a sequence too.
        self.most_sequences = 1 + int(np.diff(self.firsts).max(initial=0))

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens and targets of row n, both [context] int64. A row past the end is padding without targets."""
        tokens = np.full(self.context, self.examples.token_ids[0], dtype=np.int64)
        targets = np.full(self.context, IGNORE_INDEX, dtype=np.int64)
        place = 0
        for number in self._examples_of(n):
            begin, end = self.examples.starts[number : number + 2].tolist()
            answer = int(self.examples.answers[number])
            own = self.examples.token_ids[begin:end]
            tokens[place : place + len(own) - 1] = own[:-1]
            targets[place + answer - begin - 1 : place + len(own) - 1] = own[answer - begin :]
            place += len(own) - 1
        return tokens, targets

    def begins(self, n: int) -> np.ndarray:
        """The positions in row n where an example begins, and where the padding begins."""
        numbers = self._examples_of(n)
        ends = np.cumsum(np.diff(self.examples.starts)[numbers] - 1)
        found = np.concatenate([[0], ends])
        return found[found < self.context]

    def _examples_of(self, n: int) -> np.ndarray:
        return self.numbers[self.firsts[n] : self.firsts[n + 1]] if n < self.count else self.numbers[:0]
