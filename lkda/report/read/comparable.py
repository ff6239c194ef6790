"""Which records may be compared: those of one text, and of one run for each mixer and seed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from lkda.checks import InputError


def check_one_run_each(runs: Iterable[tuple[Hashable, object]]) -> None:
    """Raises InputError for two runs of the same mixer and seed, whose mean would be taken for one over seeds.

    Args:
        runs: for each, its mixer, its seed and what else may differ, and its name.
    """
    names: dict[Hashable, object] = {}
    for key, name in runs:
        if key in names:
            raise InputError(
                f"{names[key]} and {name} have the same mixer and seed, so they differ in another setting, or are the "
                "same: give one of them."
            )
        names[key] = name


def check_same_text(fingerprints: Iterable[tuple[Mapping[str, Any] | None, object]], *, split: str) -> None:
    """Raises InputError for runs that were measured on different tokens. Runs of earlier versions do not say on which.

    Args:
        fingerprints: of the data of each run, and its name.
        split: "validation" or "test".
    """
    first: dict[str, object] = {}
    for fingerprint, name in fingerprints:
        found = (fingerprint or {}).get(split)
        if found is not None:
            first.setdefault(found, name)
    if len(first) > 1:
        one, other, *_ = first.values()
        raise InputError(
            f"the {split} tokens of {one} are not those of {other}, because the texts differ, or their tokenizers: "
            "give runs of one corpus."
        )
