"""Reads the files of `scripts/evaluate.py out=`, and keeps many of them in one file."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.report.read.files import read_results_file, write_atomically

EVALUATIONS = "evaluations.json"
Record = Mapping[str, Any]


def evaluations_of_arguments(
    arguments: Sequence[str], *, usage: str | None, also: Sequence[str] = ()
) -> tuple[list[Record], Path]:
    """The records of the files that the arguments of a command name, and the directory to write into.

    Args:
        arguments: glob patterns of files, then the directory.
        usage: what is printed where there are fewer than two arguments.
        also: as in `read_evaluations`.
    Raises: SystemExit with the usage; ValueError as `read_evaluations` does.
    """
    if len(arguments) < 2:
        raise SystemExit(usage)
    *patterns, out = arguments
    paths = sorted({Path(path) for pattern in patterns for path in glob.glob(pattern)})
    return read_evaluations(paths, also=also), Path(out)


def read_evaluations(paths: Sequence[Path], *, also: Sequence[str] = ()) -> list[Record]:
    """The entries "run", "data" and "result" of each file, and those named in `also`.

    Raises: ValueError where a file is not one of `scripts/evaluate.py out=`, does not say which run the model is of, or
        where there are no files.
    """
    records: list[Record] = []
    for path in paths:
        record = read_results_file(path, kind="evaluation")
        try:
            records.append({name: record[name] for name in ("run", "data", "result", *also)})
        except KeyError as error:
            raise InputError(f"{path} was not written by scripts/evaluate.py out=... ({error}).") from error
        if not record["run"]:
            raise InputError(
                f"{path} does not name the model's mixer: evaluate the run's own checkpoint ({record.get('ckpt')})."
            )
    if not records:
        raise InputError("there are no evaluations: give files that scripts/evaluate.py out=... wrote.")
    return records


def keep_evaluations(records: Sequence[Record], directory: Path, *, kind: str) -> None:
    """Writes records to evaluations.json in `directory`, as a file of `kind`."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {"kind": kind, "evaluations": list(records)}
    write_atomically(directory / EVALUATIONS, json.dumps(found, indent=1) + "\n")


def kept_evaluations(path: Path, *, kind: str) -> list[Record]:
    """The records that `keep_evaluations` wrote. Raises: ValueError where `path` is not of `kind` or holds none."""
    found = read_results_file(path, kind=kind).get("evaluations")
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} holds no evaluations.")
    return found
