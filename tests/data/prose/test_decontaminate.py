"""Dropping from a training text what also validates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from lkda.data.prose.decontaminate import WINDOW, Decontamination, decontaminate, window_hashes
from lkda.data.text.documents import Splits
from lkda.data.text.tokenize import tokenize_splits
from lkda.data.text.tokenizer import load_tokenizer

WORDS = "peace labor state union people house free speak strong land north south river law court"


def paragraph(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), words))


def dropped(
    folder: Path, train: list[str], validation: list[str], test: tuple[str, ...] = ()
) -> tuple[Decontamination, list[str]]:
    """What is said of it, and the documents that are left."""
    with Progress(disable=True) as progress:
        tokenize_splits(Splits(train, validation, test), folder, given=None, vocab_size=300, progress=progress)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        decontamination = decontaminate(
            [folder / "train.npy"],
            {name: folder / f"{name}.npy" for name in ("validation", *(["test"] if test else []))},
            folder / "kept.npy",
            tokenizer=tokenizer,
            progress=progress,
        )
    kept = tokenizer.decode(np.load(folder / "kept.npy").tolist(), skip_special_tokens=False)
    return decontamination, kept.split("<|endoftext|>")[1:]


def test_a_paragraph_that_validates_is_dropped_and_its_neighbours_stay(tmp_path):
    shared = paragraph(1)
    train = [f"{paragraph(2)}\n\n{shared}\n\n{paragraph(3)}", paragraph(4)]
    decontamination, kept = dropped(tmp_path, train, [f"{paragraph(5)}\n\n{shared}\n\n{paragraph(6)}"])
    assert kept == [f"{paragraph(2)}\n\n{paragraph(3)}", paragraph(4)]
    assert 0.2 < decontamination.before["validation"] < 0.5
    assert decontamination.after == {"validation": 0}
    assert decontamination.dropped_bytes == len(shared) + 2
    assert decontamination.train_bytes == sum(len(text) for text in kept)


def test_a_document_without_blank_lines_loses_a_line(tmp_path):
    train = [f"{paragraph(2)}\n{paragraph(1)}\n{paragraph(3)}"]
    _, kept = dropped(tmp_path, train, [paragraph(1)])
    assert kept == [f"{paragraph(2)}\n{paragraph(3)}"]


def test_a_neighbour_that_begins_alike_stays(tmp_path):
    train = [f"{paragraph(1)}\n\nlaw {paragraph(3)}", paragraph(4)]
    decontamination, kept = dropped(tmp_path, train, [f"{paragraph(1)}\n\nlaw {paragraph(6)}"])
    assert kept == [f"law {paragraph(3)}", paragraph(4)]
    assert decontamination.after == {"validation": 0}


def test_a_run_across_paragraphs_takes_all_of_them(tmp_path):
    lines = "\n\n".join(paragraph(n, words=3) for n in range(10, 20))
    _, kept = dropped(tmp_path, [f"{paragraph(2)}\n\n{lines}", paragraph(3)], [f"{lines} {paragraph(4)}"])
    assert kept == [f"{paragraph(2)}\n\n", paragraph(3)]


def test_a_document_of_which_nothing_is_left_is_none(tmp_path):
    decontamination, kept = dropped(tmp_path, [paragraph(1), paragraph(2)], [paragraph(1)])
    assert kept == [paragraph(2)]
    assert decontamination.before == {"validation": 1}


def test_what_tests_is_dropped_as_what_validates_is(tmp_path):
    train = [f"{paragraph(2)}\n\n{paragraph(1)}\n\n{paragraph(3)}\n\n{paragraph(4)}"]
    decontamination, kept = dropped(tmp_path, train, [paragraph(1)], (f"{paragraph(3)} {paragraph(5)}",))
    assert kept == [f"{paragraph(2)}\n\n{paragraph(4)}"]
    assert decontamination.before["validation"] > 0.9
    assert 0.2 < decontamination.before["test"] < 0.5
    assert decontamination.after == {"validation": 0, "test": 0}


def test_text_that_shares_little_stays_as_it_is(tmp_path):
    train = [f"{paragraph(1)} {paragraph(7, words=4)}\n\n\n{paragraph(2)}", "ünïcode 漢字 🙂", "short"]
    decontamination, kept = dropped(tmp_path, train, [f"{paragraph(3)} {paragraph(7, words=4)}", "short"])
    assert kept == train
    assert (decontamination.before, decontamination.after) == ({"validation": 0.0}, {"validation": 0.0})
    assert decontamination.dropped_bytes == 0
    assert decontamination.train_bytes == sum(len(text.encode()) for text in train)


@pytest.mark.parametrize("length", [0, 1, WINDOW - 1, WINDOW, WINDOW + 5])
def test_windows_have_one_hash_each_that_depends_on_the_order(length):
    tokens = np.arange(length, dtype=np.uint16)
    assert len(window_hashes(tokens)) == max(0, length - WINDOW + 1)
    assert len(set(window_hashes(tokens)) | set(window_hashes(tokens[::-1]))) == 2 * max(0, length - WINDOW + 1)
