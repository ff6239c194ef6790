"""What many tests need: a small corpus, a cache of its own, and very small runs."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

# A test must neither read nor fill the user's caches, nor reach for a network. What one test compiled or tokenized, no
# other test of the session has to: xdist's workers, and a pytest that a test starts, inherit the directory.
CACHES = "LKDA_TEST_CACHES"
MADE_HERE = CACHES not in os.environ
if MADE_HERE:
    os.environ[CACHES] = tempfile.mkdtemp(prefix="lkda-tests-")
os.environ["LKDA_CACHE"] = os.environ[CACHES] + "/lkda"
os.environ["HF_HOME"] = os.environ[CACHES] + "/huggingface"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ[CACHES] + "/inductor"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

# What is imported and collected stays until the end: looking through it for garbage again and again takes seconds.
gc.disable()

SUBJECTS = ("the president", "a farmer", "the old senate", "my neighbour", "every citizen", "a young judge")
VERBS = ("reads", "signs", "carries", "opposes", "remembers", "writes")
OBJECTS = ("a letter", "the new law", "the map of the west", "some bread", "the long report", "a café menu")

# Marks of few tests. A run of one of them opens only the files that hold it: `-m gpu` needs nothing but torch then, and
# the others do not import what they do not use.
RARE = ("gpu", "readers", "serial", "slow", "long")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    marks = config.getoption("markexpr").split(" or ")
    if not set(marks) <= set(RARE):
        return None
    files = [collection_path] if collection_path.is_file() else collection_path.rglob("test_*.py")
    texts = (file.read_text(encoding="utf-8") for file in files)
    words = [f"mark.{mark}" for mark in marks] + ["mark.sample"] * ("long" in marks)
    return None if any(word in text for text in texts for word in words) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.sample(n)`: CI runs the first and every n-th case of a test, and `make test-long` the others.

    What is marked as both long and slow is long.
    """
    cases: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("sample"):
            test = item.nodeid.partition("[")[0]
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.long)
            cases[test] += 1
        if item.get_closest_marker("long"):
            item.own_markers[:] = [own for own in item.own_markers if own.name != "slow"]


@pytest.fixture(autouse=True)
def own_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own global console of rich. Rich silences the console once its output was closed."""
    if "rich" in sys.modules:
        monkeypatch.setattr(sys.modules["rich"], "_console", None)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    if MADE_HERE:
        shutil.rmtree(os.environ[CACHES], ignore_errors=True)


@pytest.fixture(scope="session")
def simple_text(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes six text files of that many simple sentences, the same each time, and returns their directory."""

    def written(count: int) -> Path:
        directory = tmp_path_factory.mktemp("corpus")
        draw = random.Random(0)
        for number in range(6):
            sentences = (f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.choice(OBJECTS)}." for _ in range(count))
            (directory / f"{number}.txt").write_text(" ".join(sentences), encoding="utf-8")
        return directory

    return written


@pytest.fixture(scope="session")
def corpus(simple_text: Callable[[int], Path]) -> Path:
    """A directory of about 20 kB of simple sentences: easy to learn, the same each time."""
    return simple_text(100)
