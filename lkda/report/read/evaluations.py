"""Reads the files of `scripts/evaluate.py out=`, and keeps many of them in one file, to which more can be added."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.read.comparable import check_one_run_each, check_same_text
from lkda.report.read.files import read_results_file

EVALUATIONS = "evaluations.json"
Record = Mapping[str, Any]
# What a record keeps of its file besides, if it is there, to tell whether records can be compared.
_COMPARED = ("split", "fingerprint", "stepwise", "state_dtype", "max_batches", "precision")
# Settings of data that change nothing of what is measured.
_OF_NO_EFFECT = ("batch_size", "num_workers", "pin_memory", "cache_dir", "seed")


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
    """The entries "run", "data" and "result" of each evaluation, those named in `also`, and those by which evaluations
    are compared.

    Args:
        paths: files of `scripts/evaluate.py out=`, or an evaluations.json, which holds those of an earlier report.
    Raises: ValueError where a file is neither, does not say which run the model is of, where there are no files, or
        where they cannot be compared.
    """
    records: list[Record] = []
    measured = [(path, record) for path in paths for record in _in_file(path)]
    for path, record in measured:
        try:
            kept = {name: record[name] for name in ("run", "data", "result", *also)}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} was not written by scripts/evaluate.py out=... ({error}).") from error
        records.append(kept | {name: record[name] for name in _COMPARED if name in record})
        if not record["run"]:
            raise InputError(
                f"{path} does not name the model's mixer: evaluate the run's own checkpoint ({record.get('ckpt')})."
            )
    if not records:
        raise InputError("there are no evaluations: give files that scripts/evaluate.py out=... wrote.")
    _check_comparable(measured)
    return records


def _in_file(path: Path) -> list[Record]:
    if path.name == EVALUATIONS:
        return kept_evaluations(path)
    return [read_results_file(path, kind="evaluation")]


def _check_comparable(measured: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
    """Raises InputError where a mean would be of runs with other settings, or figures of different texts."""
    check_one_run_each((_identity(record), path) for path, record in measured if record["run"].get("seed") is not None)
    texts: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for path, record in measured:
        if "bits_per_byte" in record["result"] and "split" in record:
            texts.setdefault(str(record["data"].get("source")), []).append((path, record))
    for source, found in texts.items():
        splits = {record["split"]: path for path, record in found}
        if len(splits) > 1:
            raise InputError(
                f"evaluations on {source} are of different splits: " + ", ".join(map(str, splits.values()))
            )
        check_same_text(((record.get("fingerprint"), path) for path, record in found), split=found[0][1]["split"])


def _identity(record: Mapping[str, Any]) -> str:
    """What two evaluations must not have in common: the mixer, the seed, and what was measured and how."""
    data = {name: value for name, value in record["data"].items() if name not in _OF_NO_EFFECT}
    how = {name: record.get(name) for name in ("split", "stepwise", "state_dtype", "max_batches", "precision")}
    own = {name: record["run"].get(name) for name in ("mixer", "model", "seed")}
    return json.dumps([own, data, how], sort_keys=True)


def keep_evaluations(records: Sequence[Record], directory: Path, *, kind: str) -> None:
    """Writes records to evaluations.json in `directory`, as a file of `kind`."""
    directory.mkdir(parents=True, exist_ok=True)
    found = {"kind": kind, "evaluations": list(records)}
    write_atomically(directory / EVALUATIONS, json.dumps(found, indent=1) + "\n")


def kept_evaluations(path: Path, *, kind: str | None = None) -> list[Record]:
    """The records that `keep_evaluations` wrote. Raises: ValueError where `path` is not of `kind` or holds none."""
    found = read_results_file(path, kind=kind).get("evaluations")
    if not isinstance(found, list) or not found:
        raise InputError(f"{path} holds no evaluations.")
    return found
