"""Compares settings with those of a run or a measurement that is there already, perhaps from another machine."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lkda.checks import InputError, refusing_damage
from lkda.commands.run.callback_options import stop_accuracy
from lkda.commands.run.run_directory import (
    MOST_SHOWN,
    PLACES,
    RunFiles,
    changed_settings,
    differences,
    recorded_config,
)
from lkda.commands.settings.paths import data_with_absolute_paths
from lkda.old_names import translated
from lkda.report.read.files import read_results_file
from lkda.training.precision import PRECISIONS, resolve_precision

# The options of data that the model of `init_from` decides, beside the groups model and mixer.
_OF_INITIAL = ("tokenizer_path", "vocab_size")
# Settings of an evaluation with which the same is measured. Those of data change nothing of it.
_OF_EVALUATION = ("split", "stepwise", "max_batches", "tasks", "limit")
_FREE_DATA = ("cache_dir", "num_workers", "pin_memory", "seed", *_OF_INITIAL)  # the tokenizer is the model's


def check_same_settings(
    now: Mapping[str, Any], recorded: Mapping[str, Any], directory: Path, *, resumes: bool, ended: bool
) -> None:
    """Raise InputError if the run in `directory` has other settings than are asked for.

    The settings that may differ are those that may differ when a run is resumed. But the result of a training that has
    ended is that of its length, so the length must be the same too.

    Args:
        now: the configuration, as config.yaml would hold it.
        recorded: the content of the config.yaml of the run.
        resumes: whether the run will be continued. Otherwise `now` is of `settings_as_recorded`, and the run may come
            from another machine, where trainer.precision=auto and the paths meant something else.
        ended: whether its training has ended.
    """
    with refusing_damage(RunFiles(directory).config):
        before, now = translated(recorded), translated(now)
        if not resumes:
            now = _on_that_machine(now, before)
        changed = changed_settings(before, now, free_places=resumes)
        changed += differences(_length(before), _length(now)) if ended else []
    if changed:
        raise InputError(
            f"{directory} holds a run with other settings ({'; '.join(changed[:MOST_SHOWN])}). Give another --out, or "
            "the recorded settings."
        )


def check_same_measurement(now: Mapping[str, Any], path: Path) -> None:
    """Raise InputError if `path` holds an evaluation with other settings than are asked for. Settings that only one of
    them has are passed over: those of another version, and those that were left to the model.

    Args:
        now: the configuration of scripts/evaluate.py, resolved.
        path: a file of its `out`. It may come from another machine.
    """
    record = read_results_file(path, kind="evaluation")
    with refusing_damage(path):
        found = {"tasks": [], **{name: record[name] for name in _OF_EVALUATION if name in record}}
        asked = {name: now[name] for name in found}
        if not now["tasks"] and "data" in record:
            asked["precision"] = str(PRECISIONS.get(now["precision"], now["precision"])).removeprefix("torch.")
            asked["state_dtype"] = now["state_dtype"] or record.get("state_dtype")
            found |= {name: record.get(name, asked[name]) for name in ("precision", "state_dtype")}
            found["data"], asked["data"] = _measured_data(record["data"], now)
        changed = differences(found, asked)
    if changed:
        raise InputError(
            f"{path} holds a measurement with other settings ({'; '.join(changed[:MOST_SHOWN])}). To measure with "
            "these, move it away, or give another out=; or ask for the recorded settings."
        )


def _measured_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of data in which two evaluations may differ: as recorded, and as they are asked for in `now`. Without
    a choice of data, they are those of the run."""
    chosen = now.get("data")
    if chosen is None:
        chosen = translated(recorded_config(Path(now["ckpt"])) or {}).get("data") or before
    free = (*_FREE_DATA, *(() if now["max_batches"] else ("batch_size",)))
    names = [name for name in before if name in chosen and name not in free]
    asked = data_with_absolute_paths(chosen)
    placed = {name: _place(asked[name], before[name]) if name in (*PLACES, "name") else asked[name] for name in names}
    return {name: before[name] for name in names}, placed


def _length(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides when a training ends. With trainer.max_tokens, trainer.max_steps has no effect."""
    trainer = config["trainer"]
    name = "max_steps" if trainer.get("max_tokens") is None else "max_tokens"
    stop = stop_accuracy(config.get("callbacks") or {})
    return {f"trainer.{name}": trainer.get(name)} | dict([stop] if stop else [])


def _on_that_machine(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `now` as they would be recorded on the machine of the run `before`."""
    precision = _precision(now["trainer"]["precision"], before["trainer"].get("precision"))
    data = dict(now["data"])
    for name in (*PLACES, "name"):
        if name in data:
            data[name] = _place(data[name], before["data"].get(name))
    found = {**now, "trainer": {**now["trainer"], "precision": precision}, "data": data}
    if now.get("init_from") is None or before.get("init_from") is None:
        return found
    of_initial = {name: before["data"].get(name) for name in _OF_INITIAL if name in data}
    groups = {"model": before["model"], "mixer": before["mixer"], "data": data | of_initial}
    return found | groups | {"init_from": _place(now["init_from"], before["init_from"])}


def _precision(now: object, before: object) -> object:
    """`now` in the form in which it is recorded. What `auto` means depends on the device."""
    if now == "auto" and before is not None:
        return before
    return resolve_precision(now, torch.device("cuda"))  # the words that it accepts are those of all devices


def _place(now: Any, before: Any) -> Any:
    """`before` if `now` may be the same path, or list of paths, on another machine: if `before` is not on this one, and
    the last parts are the same. Otherwise `now`."""
    if isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        return [_place(*pair) for pair in zip(now, before, strict=True)]
    if not isinstance(now, str) or not isinstance(before, str) or not Path(before).is_absolute():
        return now
    is_here = bool(glob.glob(before)) or Path(before).exists()
    return before if not is_here and Path(now).name == Path(before).name else now
