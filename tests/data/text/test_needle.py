"""data=needle: a hidden passage, repeated at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress

from lkda.data.text.cache import publish
from lkda.data.text.documents import Splits
from lkda.data.text.needle import Needle
from lkda.data.text.tokenize import tokenize_splits


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("needle")
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    text = " ".join(np.random.default_rng(0).choice(words, 4000))
    (built := home / "built").mkdir()
    with Progress(disable=True) as progress:
        metadata = tokenize_splits(
            Splits([text], [text], [text[::-1]]), built, given=None, vocab_size=400, progress=progress
        )
    publish(built, home / "prose", metadata)
    return home / "prose"


def needle(prose: Path, **changes: object) -> Needle:
    options: dict[str, object] = {"lengths": [128, 256], "depths": [0, 50, 100], "examples": 3, "cue": 4, "answer": 12}
    return Needle(directory=str(prose), **{**options, **changes})  # type: ignore[arg-type]


def test_the_passage_stands_where_it_is_said_and_at_the_end(prose):
    data = needle(prose)
    data.prepare()
    batches = list(data.val_dataloader())
    assert len(batches) == data.val_batches == 3 * (2 * 3 + 2)
    for batch in batches:
        subset = data.val_subsets[batch["subset"]]
        tokens, targets = batch["tokens"][0].numpy(), batch["targets"][0].numpy()
        assert len(tokens) == len(targets) == subset["length"]
        assert batch["target_positions"].tolist() == list(range(subset["length"] - 12, subset["length"]))
        assert (targets[:-12] == -100).all()
        whole = np.append(tokens, targets[-1])
        assert (whole[1:][-12:] == targets[-12:]).all()
        passage, text = whole[-16:], subset["length"] + 1 - 16 * (1 + subset["needles"])
        found = [n for n in range(len(whole) - 31) if (whole[n : n + 16] == passage).all()]
        assert found == ([text * subset["depth"] // 100] if subset["needles"] else [])


def test_depths_hide_the_same_passage_in_the_same_text(prose):
    data = needle(prose)
    data.prepare()
    early, middle, _, _, _, _, without, _ = (data.sequence(data._validation, subset, 1) for subset in data.val_subsets)
    assert sorted(early) == sorted(middle)
    assert (early[-16:] == middle[-16:]).all()
    assert len(without) == len(early)


def test_the_test_split_is_made_of_the_test_text(prose):
    data = needle(prose)
    data.prepare()
    assert data.test is not None
    batches = list(data.in_order(data.test.batches))
    assert len(batches) == data.val_batches
    subset = data.val_subsets[batches[4]["subset"]]
    expected = data.sequence(np.load(prose / "test.npy"), subset, 1)
    assert (batches[4]["tokens"][0].numpy() == expected[:-1]).all()
    assert not (expected == data.sequence(np.load(prose / "validation.npy"), subset, 1)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": [32]}, "lengths"),
        ({"depths": [120]}, "depths"),
        ({"lengths": [128, 256, 128]}, "data.lengths has 128 twice: leave one of them out"),
        ({"depths": [0, 50, 50]}, "data.depths has 50 twice"),
        ({"depths": []}, "at least one entry"),
        ({"examples": 0}, "examples"),
        ({"lengths": [8192]}, "need twice as many"),
    ],
)
def test_bad_numbers_get_one_clear_message(prose, changes, message):
    with pytest.raises(ValueError, match=message):
        needle(prose, **changes).prepare()


def test_it_does_not_train(prose):
    with pytest.raises(ValueError, match="only for evaluation"):
        _ = needle(prose).tokens_per_batch
