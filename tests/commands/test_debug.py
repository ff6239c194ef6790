"""debug=fast trains a very small model for a few steps, whatever data are chosen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from rich.progress import Progress

from lkda.commands.train import train
from lkda.data.text.cache import publish
from lkda.data.text.datamodule import PREPARED
from lkda.data.text.documents import Splits
from lkda.data.text.tokenize import tokenize_splits
from tests.commands.small import ROOT, composed

DATA = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))
# It measures models of text, and trains none.
MEASURES = "needle"
# data=hub with the names of data sets; tests/commands/test_hub.py trains on them.
RECIPES = ("fineweb_edu", "tinystories")
# Tokenizing 12 MB takes a quarter of a minute. The documentation's `python scripts/train.py debug=fast` does it in CI.
LONG = "sotu"


def required(name: str, corpus: Path, directory: Path) -> list[str]:
    """What a user must give or have prepared, by choice."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    if name == "files":
        return [f"data.paths=[{corpus}]"]
    if name == "hub":
        rows = (json.dumps({"text": text}) for text in texts * 20)
        (directory / "train.jsonl").write_text("\n".join(rows) + "\n")
        return [f"data.name={directory}"]
    if name == "completions":
        rows = (json.dumps({"prompt": text[:20], "completion": text[20:40]}) for text in texts * 20)
        (directory / "pairs.jsonl").write_text("\n".join(rows) + "\n")
        return [f"data.paths=[{directory}/pairs.jsonl]"]
    if name in PREPARED or name == "tokens":
        (built := directory / "built").mkdir()
        with Progress(disable=True) as progress:
            metadata = tokenize_splits(
                Splits(texts[1:], texts[:1]), built, given=None, vocab_size=350, progress=progress
            )
        publish(built, directory / "prose", metadata)
        return [f"data.paths=[{directory}/prose]" if name == "tokens" else f"data.directory={directory}/prose"]
    return []


CHOICES = [
    pytest.param(name, marks=pytest.mark.long) if name == LONG else name
    for name in DATA
    if name not in (MEASURES, *RECIPES)
]


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", CHOICES)
def test_it_trains_on_every_choice(name: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = ("debug=fast", f"data={name}", "trainer=cpu", *required(name, corpus, tmp_path / "data"))
    summary = train(composed("train", *words), tmp_path / "run")
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 2 * 32)


def test_what_only_measures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data=needle is only for evaluation: use scripts/evaluate.py"):
        train(composed("train", "debug=fast", f"data={MEASURES}", "trainer=cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_sizes_are_of_the_choice_that_an_experiment_makes() -> None:
    config = composed("train", "experiment=kimi_synthetics", "debug=fast")
    assert (config.data.context, config.data.val_examples, config.model.vocab_size) == (32, 4, None)
    assert instantiate(config.data).source == "palindrome"
    assert composed("train", "debug=fast", "data.context=64").data.context == 64
    assert composed("train", "debug=anomaly").data.context == 256
