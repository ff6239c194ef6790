"""Training text in which passages are repeated."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkda.checks import InputError
from lkda.data.text.files import file_sources
from lkda.data.text.passages import PASSAGE, document, write_passages
from lkda.data.text.tokenize import tokenize_into
from lkda.data.text.tokens import TokensDataModule

START = 0
TEXT = np.where(np.arange(5000) % 50 == 0, START, np.arange(5000) + 1)  # a document of 50 tokens after another


def test_each_passage_occurs_four_times() -> None:
    made = document(TEXT, start=START, length=512, passages=3, number=4)
    assert made.shape == (512,)
    assert (made == START).tolist() == [True] + 511 * [False]
    found = Counter(tuple(made[at : at + PASSAGE]) for at in range(1, len(made) - PASSAGE + 1))
    assert sorted(count for count in found.values() if count > 1) == [4, 4, 4]
    assert (made == document(TEXT, start=START, length=512, passages=3, number=4)).all()
    assert (made != document(TEXT, start=START, length=512, passages=3, number=5)).any()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small prepared corpus."""
    home = tmp_path_factory.mktemp("text")
    for number in range(12):
        words = np.random.default_rng(number).integers(500, size=900)
        (home / f"{number}.txt").write_text(" ".join(f"word{word}" for word in words))
    sources = file_sources([f"{home}/*.txt"], val_paths=(), val_fraction=0.1, test_fraction=0.1, text_column="text")
    tokenize_into(home / "corpus", sources, vocab_size=300, tokenizer_path=None)
    return home / "corpus"


def test_it_is_read_beside_the_corpus(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "passages"
    assert write_passages(corpus, out, lengths=[256], tokens=5 * 256) == (5, 5 * 256)
    data = TokensDataModule(paths=[str(corpus), str(out)], weights=[0.5, 0.5], context=256, batch_size=1)
    data.prepare()
    assert data.train_tokens == len(np.load(corpus / "train.npy")) + 5 * 256
    assert data.val_tokens == len(np.load(corpus / "validation.npy"))  # the passages add nothing to it


def test_documents_of_several_lengths_have_about_as_many_tokens_each(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "passages"
    assert write_passages(corpus, out, lengths=[256, 512, 1024], tokens=7000) == (
        9 + 4 + 2,
        9 * 256 + 4 * 512 + 2 * 1024,
    )
    token_ids = np.load(out / "train.npy")
    starts = np.flatnonzero(token_ids == token_ids[0])  # no document has the token that begins it elsewhere
    lengths = np.diff([*starts, len(token_ids)]).tolist()
    assert Counter(lengths) == {256: 9, 512: 4, 1024: 2}
    assert lengths not in (sorted(lengths), sorted(lengths, reverse=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"lengths": [256, 200], "tokens": 9999}, "--lengths must be a whole number of 256 or more, got 200"),
        ({"lengths": [256, 512], "tokens": 700}, "--tokens must be a whole number of 768 or more, got 700"),
        ({"lengths": [256, 10**6], "tokens": 10**7}, "give --lengths of at most"),
    ],
)
def test_bad_input(sizes: dict[str, Any], message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_passages(corpus, tmp_path / "passages", **sizes)
    assert not (tmp_path / "passages").exists()


def test_an_existing_directory_is_kept(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        write_passages(corpus, tmp_path, lengths=[256], tokens=256)
    with pytest.raises(InputError, match="no complete tokenized corpus"):
        write_passages(tmp_path / "none", tmp_path / "out", lengths=[256], tokens=256)
