"""How changes of the recipe affect each mixer, from run directories.

    python -m lkda.report.studies.recipe 'multirun/recipe_tiny/*' outputs/recipe_tiny

This writes runs.json, which holds what was read, and table.json, which `lkda.report.redraw` makes again. The table has
a row for each set of settings and a column for each mixer. A cell holds the bits per byte of the validation and, in
brackets, the share of steps whose gradient was clipped.

A row names the settings that differ from the default, which is the value that most runs of the mixer have. So each run
should change one thing of the default.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.old_names import translated
from lkda.report.read.files import read_results_file
from lkda.report.read.runs import Run
from lkda.report.read.settings import flatten
from lkda.report.studies.from_runs import print_rows, write_study

KIND = "recipe"
_QK_NORM = "mixer.softmax.qk_norm=true"
_GROUPS = ("model.", "optimizer.", "scheduler.", "trainer.", "data.", "mixer.")
# Settings of these groups that do not affect the results, or follow from others.
_NEUTRAL = {"data.seed", "data.cache_dir", "data.num_workers", "data.pin_memory", "trainer.val_check_interval"}
_MEASURED = {"bits_per_byte": "val/bits_per_byte", "loss": "val/loss"}
_COPIED = ("clipped_share", "params", "tokens", "seed")


def rows(runs: Sequence[Mapping[str, Any]], *, base: Collection[str] = ()) -> list[dict[str, str]]:
    """The rows of the table, in the order in which the settings first occur.

    Args:
        base: overrides of the row that is called `nothing`, which the other rows do not name.
    """
    columns = list(dict.fromkeys(_column(run) for run in runs))
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        cell = f"{run['bits_per_byte']:.3f} ({run['clipped_share']:.1%})"
        found.setdefault(_settings(run["overrides"], base), {})[_column(run)] = cell
    return [
        {"changed": settings, **{column: cells.get(column, "") for column in columns}}
        for settings, cells in found.items()
    ]


def _column(run: Mapping[str, Any]) -> str:
    return f"{run['mixer']}, QK-norm" if _QK_NORM in run["overrides"] else str(run["mixer"])


def _settings(overrides: str, base: Collection[str]) -> str:
    """What differs from the base, as `embed_norm=true lr=4e-3`."""
    kept = [word for word in overrides.split() if word not in (_QK_NORM, *base) and not word.startswith("mixer=")]
    for group in _GROUPS:
        kept = [word.removeprefix(group) for word in kept]
    return " ".join(f"`{word}`" for word in kept) or "nothing"


def redraw(path: Path) -> None:
    """Writes table.json beside a file of runs. Raises: ValueError where the file is of another kind."""
    found = read_results_file(path, kind=KIND)
    table = {"kind": "table", "rows": rows(found["runs"], base=found["base"].split()), "note": found["note"]}
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")


def collect(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of runs.json for finished runs of text.

    Raises: InputError where there are none, where one is not of text, or where two have the same settings.
    """
    if not runs:
        raise InputError("there are no finished runs: give run directories, or a pattern that matches some.")
    for run in runs:
        missing = [key for key in (*_MEASURED.values(), *_COPIED, "versions") if run.summary.get(key) is None]
        if missing:
            raise InputError(f"{run.name}: summary.json lacks {', '.join(missing)}; give runs on text.")
    described = [(run.summary["mixer"], _effective(translated(run.config))) for run in runs]
    found: list[dict[str, Any]] = []
    for run, (mixer, settings) in zip(runs, described):
        default = {name: _usual(name, mixer, described) for name in settings}
        changed = [_override(name, value) for name, value in settings.items() if value != default[name]]
        overrides = " ".join((f"mixer={mixer}", *changed))
        twin = next((one["name"] for one in found if one["overrides"] == overrides), None)
        if twin is not None:
            raise InputError(f"{twin} and {run.name} have the same settings: give one of them.")
        measured = {name: run.summary[key] for name, key in _MEASURED.items()}
        copied = {name: run.summary[name] for name in _COPIED} | {"torch": run.summary["versions"]["torch"]}
        found.append({"name": run.name, "mixer": mixer, "overrides": overrides} | measured | copied)
    default_first = sorted(found, key=lambda run: (_settings_but_seed(run), run["overrides"].partition(" ")[2]))
    return {"kind": KIND, "note": _note(runs), "base": "", "runs": default_first}


def _usual(name: str, mixer: str, described: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """The most frequent value of a setting among the runs of the mixer; of two, the one that more runs of all have."""
    own = Counter(found[name] for of, found in described if of == mixer and name in found)
    everywhere = Counter(found[name] for _, found in described if name in found)
    return max(own, key=lambda value: (own[value], everywhere[value]))


def _effective(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that affect the results: {dotted name: value as the command line takes it}."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in flatten(config).items()
        if (name == "seed" or name.startswith(_GROUPS)) and name not in _NEUTRAL
    }


def _override(name: str, value: str) -> str:
    """As optimizer.betas=[0.9,0.99] or, for a choice of a group, optimizer=muon."""
    return f"{name.removesuffix('.name')}={value}"


def _settings_but_seed(run: Mapping[str, Any]) -> list[str]:
    return [word for word in run["overrides"].split()[1:] if not word.startswith("seed=")]


def _note(runs: Sequence[Run]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({str(run.summary[name]) for run in runs}))

    context = f"data={all_of('data')} at {all_of('context')} tokens"
    tokens = ", ".join(f"{n / 1e6:.2f}M" for n in sorted({run.summary["tokens"] for run in runs}))
    torch = ", ".join(sorted({run.summary["versions"]["torch"] for run in runs}))
    return (
        "Bits per byte of the validation at the end of the run, and the share of clipped steps. "
        f"model={all_of('model')}, {context}, {tokens} tokens, {all_of('precision')}; "
        f"{all_of('device')}, torch {torch}."
    )


def main(arguments: Sequence[str]) -> None:
    """Arguments: glob patterns of run directories, then the directory to write into."""
    found, out = write_study(arguments, usage=__doc__, collect=collect, redraw=redraw)
    print_rows(rows(found["runs"]))
    print(f"{out} holds runs.json and table.json")


if __name__ == "__main__":
    main(sys.argv[1:])
