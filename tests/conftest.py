"""What many tests need: a small corpus, a cache of its own, and very small runs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

# A test must neither read nor fill the user's cache, nor reach for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

SUBJECTS = ("the president", "a farmer", "the old senate", "my neighbour", "every citizen", "a young judge")
VERBS = ("reads", "signs", "carries", "opposes", "remembers", "writes")
OBJECTS = ("a letter", "the new law", "the map of the west", "some bread", "the long report", "a café menu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` opens only files that hold such tests: torch is enough for these, and others need more."""
    if config.getoption("markexpr") != "gpu":
        return None
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    return None if any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) else True


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """LKDA_CACHE for this process."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["LKDA_CACHE"] = str(directory)
    yield directory
    del os.environ["LKDA_CACHE"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of six text files of simple sentences, about 20 kB: easy to learn, the same each time."""
    directory = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for number in range(6):
        sentences = (f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}." for _ in range(100))
        (directory / f"{number}.txt").write_text(" ".join(sentences), encoding="utf-8")
    return directory
