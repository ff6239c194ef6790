"""How a reader repeats what a page shows: where its commands run, and the versions that made the results."""

from __future__ import annotations

from collections.abc import Iterable

DIGITS = 12  # of a commit


def how_to_repeat(runs: Iterable[object], benchmarks: Iterable[object]) -> str:
    """The installation, the device and the versions, in words.

    Args:
        runs, benchmarks: their entries `git_commit`; None where it was not recorded.
    """
    return (
        'Open a cell that says "command" to see how to repeat its row. The commands run in a checkout of lkda after '
        "pip install -e . (on an NVIDIA GPU pip install -e '.[cuda]'), or in the environment that make train makes; "
        "README.md has the details. They need the device that the row or its table names."
        f"{_versions('runs', runs)}{_versions('measurements', benchmarks)}"
    )


def _versions(what: str, commits: Iterable[object]) -> str:
    named = [str(commit).replace("+changes", " with uncommitted changes") for commit in commits if commit]
    short = sorted({f"{one[:DIGITS]}{one[len(one.split()[0]) :]}" for one in named})
    return f" The {what} are of commit {', '.join(short)}." if short else ""
