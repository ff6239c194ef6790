"""Files that `scripts/evaluate.py out=` has written -> records; and many of them kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.report.read.files import read_results_file, write_atomically

EVALUATIONS = "evaluations.json"
Record = Mapping[str, Any]


def read_evaluations(paths: Sequence[Path], *, also: Sequence[str] = ()) -> list[Record]:
    """The entries run, data and result of each file, and those named in `also`.

    Raises: ValueError for a file that `scripts/evaluate.py out=` has not written, for one of a model whose run is not
        known, or where there is no file at all.
    """
    records: list[Record] = []
    for path in paths:
        record = read_results_file(path, kind="evaluation")
        try:
            records.append({name: record[name] for name in ("run", "data", "result", *also)})
        except KeyError as error:
            raise InputError(f"{path} is not of scripts/evaluate.py out=... ({error}).") from error
        if not record["run"]:
            raise InputError(
                f"{path} does not name the model's mixer: evaluate the run's own checkpoint ({record.get('ckpt')})."
            )
    if not records:
        raise InputError("there are no evaluations: give files that scripts/evaluate.py out=... has written.")
    return records


def keep_evaluations(records: Sequence[Record], directory: Path, *, kind: str) -> None:
    """Writes what was read to evaluations.json in `directory`, as a file of `kind`."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {"kind": kind, "evaluations": list(records)}
    write_atomically(directory / EVALUATIONS, json.dumps(found, indent=1) + "\n")


def kept_evaluations(path: Path, *, kind: str) -> list[Record]:
    """What `keep_evaluations` wrote. Raises: ValueError where `path` is not of `kind` or holds none."""
    found = read_results_file(path, kind=kind).get("evaluations")
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} holds no evaluations.")
    return found
