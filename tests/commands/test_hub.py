"""Training on a data set by name: a local directory, and one that stands for a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lkda.commands.train import train
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
