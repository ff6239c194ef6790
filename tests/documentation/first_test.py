"""A plug-in of pytest that keeps the first test that a command line selects: the suite itself runs elsewhere."""

import re
from pathlib import Path

import pytest

FILES = 2  # that are opened to find it
_opened: list[Path] = []
_FOUND = pytest.StashKey[bool]()  # whether the command line selects any test


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of files, the first that hold what is selected; never those of the documentation, which would run itself."""
    if collection_path.is_dir():
        return True if collection_path.name == "documentation" else None
    asked = [Path(word.partition("::")[0]).resolve() for word in config.args]
    if not collection_path.name.startswith("test_") or not any(map(collection_path.is_relative_to, asked)):
        return None  # no tests, or listed on the way to what is asked for
    wanted = re.sub(r"not \w+", "", f"{config.getoption('markexpr') or ''} {config.getoption('keyword') or ''}")
    text = f"{collection_path}\n{collection_path.read_text(encoding='utf-8')}"
    words = [word for word in re.findall(r"\w+", wanted) if word not in ("and", "or")]
    enough = any if " or " in wanted else all
    if len(_opened) >= FILES or (words and not enough(word in text for word in words)):
        return True
    _opened.append(collection_path)
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After what the command line leaves out. Tests that are too long for CI, or that measure time and would run beside
    others here, are found, but not run."""
    unfit = ("long", "serial")
    kept = [item for item in items if not any(map(item.get_closest_marker, unfit))][:1]
    config.stash[_FOUND] = bool(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(_FOUND, False):
        session.exitstatus = pytest.ExitCode.OK
