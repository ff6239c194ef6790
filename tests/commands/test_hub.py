"""Training on a data set by name: a local directory, and one that stands for a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lkda.checks import InputError
from lkda.commands.train import train
from lkda.data.text.tokenizer import load_tokenizer
from tests.commands.small import ROOT, composed

SMALL = ("debug=fast", "trainer=cpu", "trainer.max_steps=2", "data=hub")


def rows(count: int) -> Iterator[dict[str, str]]:
    for n in range(count):
        yield {"text": f"once there were {n} words, and then {n + 1} words, and no end of words was there to be seen."}


def test_a_run_trains_on_a_directory(tmp_path: Path) -> None:
    (folder := tmp_path / "set").mkdir()
    for split, count in (("train", 40), ("test", 8)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    options = (f"data.name={folder}", "data.val_split=test", f"data.cache_dir={tmp_path}/cache")
    summary = train(composed("train", *SMALL, *options), tmp_path / "run")
    assert summary["status"] == "finished"
    assert summary["steps"] == 2
    assert summary["data"] == str(folder)


def test_a_file_without_a_row_is_named(tmp_path: Path) -> None:
    (folder := tmp_path / "set").mkdir()
    (folder / "train.jsonl").touch()
    with pytest.raises(InputError, match=rf"split 'train' of {folder} holds no row"):
        train(composed("train", *SMALL, f"data.name={folder}", f"data.cache_dir={tmp_path}/cache"), tmp_path / "run")


def test_the_command_of_the_readme_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of it as it stands there; the hub's answer comes from here."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((name, subset, options["split"], options["streaming"]))
        return rows(400)

    (line,) = (line for line in (ROOT / "README.md").read_text().splitlines() if "data=hub data.name=" in line)
    words = [word for word in line.split("#")[0].split() if "=" in word]
    assert {"data=hub", "data.name=roneneldan/TinyStories", "data.streaming=true"} <= set(words)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    summary = train(composed("train", *SMALL, *words, f"data.cache_dir={tmp_path}/cache"), tmp_path / "run")
    assert summary["status"] == "finished"
    assert summary["data"] == "roneneldan/TinyStories"
    assert asked == [("roneneldan/TinyStories", None, "train", True)]


def hub_layout(home: Path, *, configs: str, files: dict[str, int]) -> Path:
    """A directory with the layout of a data set of the hub: a README.md with YAML, and parquet files."""
    import pyarrow
    import pyarrow.parquet

    for name, count in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([{**row, "id": n} for n, row in enumerate(rows(count))])
        pyarrow.parquet.write_table(table, home / name)
    (home / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A data set\n")
    return home


TINY_STORIES = """- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: validation, path: data/validation-*}
"""
FINEWEB = """- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["tinystories", "fineweb_edu"])
def test_a_recipe_trains_on_a_directory_of_the_same_layout(tmp_path: Path, name: str) -> None:
    """A local directory stands for the data set of the hub. Everything else is as in the configuration."""
    if name == "tinystories":
        files = {"data/train-00000-of-00002.parquet": 90, "data/train-00001-of-00002.parquet": 60}
        home = hub_layout(tmp_path / "set", configs=TINY_STORIES, files={**files, "data/validation-0.parquet": 20})
        words, documents = (), 149
    else:
        files = {"data/CC-MAIN-2013-20/train-0.parquet": 500, "sample/10BT/000_00000.parquet": 1500}
        home = hub_layout(tmp_path / "set", configs=FINEWEB, files={**files, "sample/10BT/001_00000.parquet": 1500})
        words, documents = ("data.max_documents=2000",), 2000 - 2 - 2
    small = ("debug=fast", "trainer=cpu", "trainer.max_steps=2", f"data={name}", "model.vocab_size=300")
    options = (f"data.name={home}", f"data.cache_dir={tmp_path}/cache", *words)
    summary = train(composed("train", *small, *options), tmp_path / "run")
    assert (summary["status"], summary["steps"], summary["data"]) == ("finished", 2, str(home))
    (tokens,) = (tmp_path / "cache").rglob("train.npy")
    start = load_tokenizer(tokens.with_name("tokenizer.json")).token_to_id("<|endoftext|>")
    assert int((np.load(tokens) == start).sum()) == documents
