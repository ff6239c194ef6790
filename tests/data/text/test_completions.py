"""Prompts with completions: only completions are predicted, and no example is cut or sees another."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkda.data.text.completions import CompletionsDataModule
from lkda.targets import IGNORE_INDEX

NOUNS = ("bread", "peace", "labor", "rivers", "houses", "laws", "ünïcode 漢字")


def example(n: int) -> dict[str, str]:
    return {"prompt": f"Number {n} has {NOUNS[n % 7]}. ", "completion": " ".join([NOUNS[n % 5]] * (1 + n % 4))}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(example(n)) + "\n" for n in range(60)))
    return path


def module(path: Path, **changes: Any) -> CompletionsDataModule:
    options: dict[str, Any] = {"context": 48, "batch_size": 2, "vocab_size": 300, "val_fraction": 0.1}
    options["cache_dir"] = str(path.parent / "cache")
    return CompletionsDataModule(**(options | {"paths": [str(path)]} | changes))


def sequences(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """The tokens and targets of each sequence that has targets."""
    bounds, tokens, targets = batch["cu_seqlens"].tolist(), batch["tokens"][0], batch["targets"][0]
    found = [(tokens[low:high].tolist(), targets[low:high].tolist()) for low, high in zip(bounds, bounds[1:])]
    return [pair for pair in found if any(target != IGNORE_INDEX for target in pair[1])]


def test_each_example_is_a_sequence_whose_completion_alone_is_predicted(pairs):
    data = module(pairs, test_fraction=0.1)
    data.prepare()
    epoch = data._train.count // 2 + 1
    found, seen = {}, 0
    for n in range(epoch):
        for tokens, targets in sequences(data.training_batches(rank=0, world_size=1)[n]):
            predicted = [target for target in targets if target != IGNORE_INDEX]
            end = data.tokenizer.token_to_id("<|endoftext|>")
            assert tokens[0] == end
            assert predicted[-1] == end
            assert targets[-len(predicted) :] == predicted
            assert tokens[-len(predicted) + 1 :] == predicted[:-1]
            found[data.tokenizer.decode(tokens[1:])] = data.tokenizer.decode(predicted)
            seen += 1
    held_out = data.validation_batches(), data.test.batches
    others = [
        data.tokenizer.decode(tokens[1:])
        for batches in held_out
        for n in range(len(batches))
        for tokens, _ in sequences(batches[n])
    ]
    assert len(others) == 12
    whole = {row["prompt"] + row["completion"]: row["completion"] for row in map(example, range(60))}
    assert found == {text: completion for text, completion in whole.items() if text not in others}
    assert seen >= len(found) == 48


def test_all_batches_have_one_shape_and_an_epoch_has_each_row_once(pairs):
    data = module(pairs)
    data.prepare()
    batches = data.training_batches(rank=0, world_size=1)
    every = [batches[n] for n in range(data._train.count)]  # two epochs
    assert len({tuple(tuple(value.shape) for value in batch.values()) for batch in every}) == 1
    rows = [tuple(row) for batch in every for row in batch["tokens"].view(2, 48).tolist()]
    assert {rows.count(row) for row in rows} == {2}


def test_bits_per_byte_are_those_of_the_completions(pairs):
    data = module(pairs, test_fraction=0.0)
    data.prepare()
    text = data.validation_batches()
    targets = [t for n in range(len(text)) for t in text[n]["targets"].flatten().tolist() if t != IGNORE_INDEX]
    completions = data.tokenizer.decode(targets, skip_special_tokens=True)
    assert data.bytes_per_token == pytest.approx(len(completions.encode()) / len(targets))
    counts = np.unique(targets, return_counts=True)[1] / len(targets)
    assert data.unigram_entropy == pytest.approx(-(counts * np.log(counts)).sum())
    assert data.test is None
    assert data.no_test == "data.test_fraction is 0"


def test_long_examples_are_refused_or_dropped(pairs):
    with open(pairs, "a") as file:
        file.write(20 * (json.dumps({"prompt": "a " * 100, "completion": "b"}) + "\n"))
    with pytest.raises(ValueError, match=r"\d+ of \d+ examples for \w+ have more than data.context=48 tokens"):
        module(pairs).prepare()
    data = module(pairs, too_long="drop")
    data.prepare()
    assert data.dropped == 20
    assert re.fullmatch(r"\d\d of \d+ examples, which are too long", data.left_out)  # of those for training


@pytest.mark.parametrize("too_long", ["error", "drop"])
def test_dropping_is_not_advised_where_no_example_fits(pairs, too_long):
    with pytest.raises(ValueError, match=r"data.context=4 tokens, the longest \d+: give a larger data.context\.$"):
        module(pairs, too_long=too_long, context=4).prepare()


def test_other_files_are_refused_by_their_name(pairs, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    for paths in ([str(folder)], [str(pairs), str(folder)]):
        data = module(pairs, paths=paths)
        with pytest.raises(ValueError, match=r"texts/a.txt must be a .jsonl or .parquet file: give files of these"):
            data.prepare()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ('{"prompt": "a", "completion": ""}\n', {}, r"row 1 of .* has no text in column 'completion'"),
        ('{"prompt": "a", "answer": "b"}\n', {}, r"no column 'completion'; it has prompt, answer. Set data.completion"),
        ('{"question": "a", "completion": "b"}\n', {}, r"no column 'prompt'; it has question, .*Set data.prompt"),
        ('{"prompt": 1, "completion": "b"}\n', {}, r"column 'prompt' of .* holds a number, not text, in row 1"),
        ('{"prompt": "a", "completion": "b"}\n', {}, r"1 examples are too few to hold out 2"),
        ('{"prompt": "a", "completion": \n', {}, r"cannot read .* as JSON lines: line 1"),
        ('["a", "b"]\n', {}, r"line 1 is a list"),
        ('{"prompt": ' + "9" * 5000 + "}\n", {}, r"cannot read .* as JSON lines: line 1: Exceeds the limit"),
        ('{"prompt": "a", "completion": "\\ud800"}\n', {}, r"column 'completion' of .* is not UTF-8 in row 1"),
        ("x", {"too_long": "cut"}, r"data.too_long must be error or drop, got 'cut'"),
        ("x", {"prompt_column": "completion"}, r"are both 'completion'"),
    ],
)
def test_bad_examples_get_one_clear_message(tmp_path, text, changes, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        module(tmp_path / "a.jsonl", **changes).prepare()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"promt": "a", "completion": "b"}', r"row 3 of .*b.jsonl has no column 'prompt'; it has promt, completion"),
        ('{"prompt": "a"}', r"row 3 of .*b.jsonl has no column 'completion'; it has prompt\."),
        ("{}", r"row 3 of .*b.jsonl has no column 'prompt'; it has none"),
        ('{"prompt": "a", "completion": null}', r"row 3 of .*b.jsonl has no text in column 'completion'"),
    ],
)
def test_a_row_without_its_prompt_is_not_trained_on(tmp_path, line, message):
    """One wrong row among many, in the second of two files: it is named, and not taken for one with an empty prompt."""
    good = '{"prompt": "", "completion": "b"}\n{"prompt": null, "completion": "c"}\n'
    (tmp_path / "a.jsonl").write_text(good * 10)
    (tmp_path / "b.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match=message):
        module(tmp_path).prepare()
