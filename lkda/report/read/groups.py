"""Groups runs that differ only in their seed, and names each group by its mixer and by what distinguishes it."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lkda.old_names import translated
from lkda.report.read.runs import Run, reported_split
from lkda.report.read.settings import GRID_KEYS, flatten

# Settings that do not affect the results. (The summary says which budget and device a run had.)
NEUTRAL = {
    *GRID_KEYS,
    *("seed", "resume", "backend", "checkpoint", "sample", "logger", "callbacks", "debug", "trainer"),
    *("data.seed", "data.cache_dir", "data.num_workers", "data.pin_memory"),
}
# Settings of a neutral section that do affect them.
EFFECTIVE = {
    *("trainer.devices", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
    "trainer.limit_val_batches",
}
# The text of a null. A missing setting counts as null.
NULL = "None"
# Entries of the summary: what was used in the end, whatever the settings were.
ACTUAL = ("tokens", "backend", "device", "precision")
# If labels would name more settings of a mixer than this, they name only the differences from one group of the mixer.
MOST_SHOWN = 2
# Compared first, because one of these names explains the differences of many settings.
NAMES = ("mixer.name", "model.name", "data.source")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: the mixer, and what distinguishes this group from the other groups of the mixer.
        unnamed: settings of the mixer that this group has and does not name, but that other groups name if they have
            others.
    """

    label: str
    mixer: str
    runs: list[Run]
    unnamed: tuple[str, ...] = ()

    def values(self, key: str) -> list[float]:
        """An entry of each run's summary."""
        return [float(run.summary[key]) for run in self.runs]

    def mean(self, key: str) -> float:
        """The mean of an entry over the runs."""
        return statistics.fmean(self.values(key))


def group_runs(runs: Iterable[Run], *, within: Collection[str] = ()) -> list[Group]:
    """The groups, sorted by bits per byte of the reported split; by loss where a run is not of text.

    Args:
        within: further settings, or sections of settings, in which the runs of a group may differ.
    """
    members: dict[tuple[Any, ...], list[tuple[Run, Settings]]] = defaultdict(list)
    described = [(run, _without(within, settings(run))) for run in runs]
    distinguishing = _distinguishing([found for _, found in described])
    for run, found in described:
        members[tuple(found.get(key, NULL) for key in distinguishing)].append((run, found))
    values: dict[tuple[str, str], set[Any]] = defaultdict(set)  # (mixer, setting): its values
    for _, found in described:
        for key in distinguishing:
            values[found["mixer"], key].add(found.get(key, NULL))
    of_groups: list[tuple[str, dict[str, str], list[Run]]] = []  # mixer, its settings as text, runs
    for same in members.values():
        found = same[0][1]
        mixer = found["mixer"]
        # A setting with one value for the mixer adds nothing to its label.
        follows = {key for key in distinguishing if _of_mixer(key) and len(values[mixer, key]) == 1}
        shown = {key: _show(key, found[key]) for key in distinguishing[1:] if key in found and key not in follows}
        of_groups.append((mixer, shown, [run for run, _ in same]))
    groups = []
    for mixer, shown, own in of_groups:
        common = _common([others for name, others, _ in of_groups if name == mixer])
        named = {key: text for key, text in shown.items() if common.get(key) != text}
        unnamed = tuple(text for key, text in common.items() if key not in named)
        groups.append(Group(" · ".join([mixer, *named.values()]), mixer, own, unnamed))
    texts = all(run.summary.get("val/bits_per_byte") is not None for run, _ in described)
    split = reported_split([run for run, _ in described])
    return sorted(groups, key=lambda group: group.mean(f"{split}/bits_per_byte" if texts else f"{split}/loss"))


def _common(of_groups: Sequence[dict[str, str]]) -> dict[str, str]:
    """What the labels of a mixer's groups do not name: the mixer's settings in the group that has most in common with
    the others. Nothing if there are few."""
    of_mixer = [{key: text for key, text in one.items() if _of_mixer(key)} for one in of_groups]
    if max(map(len, of_mixer)) <= MOST_SHOWN:
        return {}
    counts = Counter(item for one in of_mixer for item in one.items())
    return max(of_mixer, key=lambda one: sum(counts[item] for item in one.items()))


def _without(sections: Collection[str], found: Settings) -> Settings:
    return {key: value for key, value in found.items() if not _inside(key, sections)}


def settings(run: Run) -> Settings:
    """The settings that may distinguish runs, in the order of a label: {dotted name: value as text}."""
    flat = {key: _text(value) for key, value in flatten(translated(run.config)).items() if not _neutral(key)}
    flat |= {key: str(run.summary[key]) for key in ACTUAL if key in run.summary}
    if "data" in run.summary:  # a synthetic task has no setting that names it
        flat.setdefault("data.source", str(run.summary["data"]))
    first = {key: flat[key] for key in NAMES if key in flat}
    return {"mixer": str(run.summary["mixer"])} | first | flat


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _of_mixer(key: str) -> bool:
    return key == "backend" or _inside(key, {"mixer"})


def _neutral(key: str) -> bool:
    return key not in EFFECTIVE and _inside(key, NEUTRAL)


def _inside(key: str, sections: Collection[str]) -> bool:
    """Whether the setting or a section that contains it is one of these."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in sections for n in range(1, len(parts) + 1))


def _distinguishing(described: Sequence[Settings]) -> list[str]:
    """The settings that distinguish the runs, each only if those before it do not suffice. What was used in the end
    comes last: a setting of a later run may explain it."""
    distinguishing = ["mixer"]
    chosen = dict.fromkeys(key for found in described for key in found if key not in ACTUAL)
    for key in (*chosen, *ACTUAL):
        seen: dict[tuple[Any, ...], set[Any]] = defaultdict(set)
        for found in described:
            seen[tuple(found.get(name, NULL) for name in distinguishing)].add(found.get(key, NULL))
        if any(len(values) > 1 for values in seen.values()):
            distinguishing.append(key)
    return distinguishing


def _show(key: str, value: str) -> str:
    short = key.split(".")[-1]
    return value if short in ("name", "source", "backend", "device", "precision") else f"{short} {value}"


def also_differing(runs: Sequence[Run]) -> list[str]:
    """Settings outside the mixer that differ between mixers and might explain a difference between them."""
    described = [settings(run) for run in runs]
    by_mixer: dict[str, set[str]] = defaultdict(set)
    found = []
    for key in dict.fromkeys(key for one in described for key in one):
        if _of_mixer(key):
            continue
        by_mixer.clear()
        for one in described:
            by_mixer[one["mixer"]].add(one.get(key, NULL))
        if len({frozenset(values) for values in by_mixer.values()}) > 1:
            found.append(key)
    return found
