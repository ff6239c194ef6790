"""Translates what earlier versions wrote to today's names: the settings in run directories and exported directories,
summary.json, and results files. Keys and names change, numbers never.

The committed results files were rewritten with `python -m lkda.old_names docs/results/*/*.json`.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lkda.io import write_atomically

Record = dict[str, Any]

# `_target_` of the group data. Checkpoints contain no module names.
DATA_MODULES = {
    "lkda.data.text.TextDataModule": "lkda.data.text.datamodule.TextDataModule",
    "lkda.data.hub.HubDataModule": "lkda.data.text.hub.HubDataModule",
    "lkda.data.needle.Needle": "lkda.data.text.needle.Needle",
    "lkda.data.mqar.MQAR": "lkda.data.synthetic.mqar.MQAR",
    "lkda.data.mqar_kimi.KimiMQAR": "lkda.data.synthetic.mqar_answered.AnsweredMQAR",
    "lkda.data.synthetic.mqar_kimi.KimiMQAR": "lkda.data.synthetic.mqar_answered.AnsweredMQAR",
    "lkda.data.palindrome.Palindrome": "lkda.data.synthetic.palindrome.Palindrome",
    "lkda.data.stack.Stack": "lkda.data.synthetic.stack.Stack",
}
# Modules that recorded commands run.
_COMMANDS = {
    "lkda.commands.grid": "lkda.commands.sweeps.grid",
    "lkda.commands.graph_losses": "lkda.commands.studies.graph_losses",
    "lkda.commands.large_text": "lkda.commands.studies.large_text",
    "lkda.commands.long_run": "lkda.commands.studies.long_run",
    "lkda.commands.peer_training": "lkda.commands.studies.peer_training",
    "lkda.commands.scaling": "lkda.commands.studies.scaling",
}
# Renamed options of the scheduler.
_SCHEDULER = {"final": "min_lr_ratio", "decay": "decay_fraction"}
# Options that were added later, by group, with the value that all earlier runs had in effect.
_LATER: dict[str, dict[str, Any]] = {
    "model": {"embed_norm": False, "embed_scale": 1.0, "init": {}},
    "optimizer": {"lr_scale": {"matrix": 1.0, "embedding": 1.0, "head": 1.0, "vector": 1.0}},
}
_LATER_OF_MIXERS: dict[str, dict[str, Any]] = {
    "kda": {"activation": "silu", "conv_std": None},
    "simplified": {"activation": "silu", "conv_std": None},
    "softmax": {"qk_norm": False, "conv_width": 0, "conv_std": None},
    "mla": {"rope_base": None, "qk_norm": False, "conv_width": 0, "conv_std": None},
    "conv": {"conv_std": None},
}
# The same for data, by source: earlier versions had no test split of text.
_LATER_OF_DATA: dict[str, dict[str, Any]] = {
    "files": {"test_paths": [], "test_from_year": None, "test_fraction": 0.0},
    "sotu": {"test_from_year": None},
    "hub": {"test_split": None, "test_fraction": 0.0},
}
# Keys of results files.
_OF_BENCHMARK_ROWS = {"floor_ms": "lower_bound_ms", "fraction_of_floor": "fraction_of_lower_bound"}
_OF_COMPARISONS = {"alone": "exclusive_device"}
_OF_COMPARISON_ROWS = {
    "bits_at_same_time": "bits_at_equal_wall_clock",
    "bits_at_same_time sd": "bits_at_equal_wall_clock sd",
}
_OF_STATE_ERRORS = {"kept": "state_dtype"}
_OF_CHECKPOINTS = {"parts": "val_subsets"}  # what a checkpoint says of its run
# Names that did not say what they name.
_PEERS = {
    "sdpa": "softmax attention (SDPA)",
    "chunk_hgrn": "fla chunk_hgrn",
    "fused_recurrent_hgrn": "fla fused_recurrent_hgrn",
}
# A measurement is noisy where the 20th and 80th percentile differ by more than this share of the median. Earlier
# versions did not say so; `lkda.bench.timing` does.
_LARGEST_SPREAD = 0.2
# What describes a subset of the validation in a summary; everything else there was measured on it.
_DESCRIBE_A_SUBSET = ("length", "pairs", "depth", "needles")
_SUBSET_OF_RESULT = re.compile(r"(accuracy|sequence_accuracy|loss)/((?:[a-z]+_\d+_?)+)")


def later_options(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The options that a recorded configuration lacks because they were added later, as {"model.embed_norm": the value
    it had in effect}.

    KDA and simplified attention without a convolution had no activation. The initial values of convolution filters were
    once an option of the model.
    """
    model = config.get("model")
    missing: dict[str, Any] = {"checkpointing": "none"} if model is not None and "checkpointing" not in config else {}
    init = model.get("init") if isinstance(model, Mapping) else None
    filters = init.get("conv_std") if isinstance(init, Mapping) else None
    groups = [(f"{name}.", config.get(name), options) for name, options in _LATER.items()]
    data = config.get("data")
    if isinstance(data, Mapping):
        groups.append(("data.", data, _LATER_OF_DATA.get(_source_of(data), {})))
    mixers = config.get("mixer")
    if isinstance(mixers, Mapping):
        groups += [(f"mixer.{name}.", mixers.get(name), options) for name, options in _LATER_OF_MIXERS.items()]
    for prefix, group, options in groups:
        if isinstance(group, Mapping):
            missing |= {prefix + name: value for name, value in options.items() if name not in group}
            if prefix + "conv_std" in missing:
                missing[prefix + "conv_std"] = filters
            if prefix + "activation" in missing and group.get("conv_width") == 0:
                missing[prefix + "activation"] = "none"
    return missing


def data_name(name: str, config: Mapping[Any, Any]) -> str:
    """Today's name of the data of a run, which its summary calls `name`. mqar_answered was once called mqar_kimi."""
    data = config.get("data")
    target = str(data.get("_target_")) if isinstance(data, Mapping) else ""
    return "mqar_answered" if name == "mqar_kimi" and target in DATA_MODULES else name


def _source_of(data: Mapping[Any, Any]) -> str:
    """sotu, files, prose or hub. "" for data that are not text."""
    return "hub" if str(data.get("_target_")).endswith(".HubDataModule") else str(data.get("source", ""))


def with_options(config: Mapping[Any, Any], options: Mapping[str, Any]) -> dict[Any, Any]:
    """A copy of a nested configuration in which some values, given by dotted names, are replaced."""
    found = copy.deepcopy(dict(config))
    for name, value in options.items():
        *path, last = name.split(".")
        group = found
        for part in path:
            group = group[part]
        group[last] = copy.deepcopy(value)
    return found


def translated(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy of a recorded configuration as it would be written today. The copy is equal if nothing in it is old."""
    found = _with_todays_names(with_options(config, later_options(config)))
    if isinstance(found.get("model"), dict):
        found["model"] = _without_filters(found["model"])
    scheduler = found.get("scheduler")
    if isinstance(scheduler, dict) and scheduler.get("name") == "constant":
        scheduler.pop("min_lr_ratio", None)  # it had no effect
    if isinstance(found.get("mixer"), dict) and isinstance(found.get("model"), dict):
        _move_to_their_groups(found)
    return found


def _with_todays_names(config: Mapping[Any, Any]) -> dict[Any, Any]:
    """A recorded configuration in which options of the scheduler and the data module have the names of today. No option
    is added, moved or removed, so that a results file says what was recorded."""
    found = dict(config)
    if isinstance(scheduler := found.get("scheduler"), Mapping):
        found["scheduler"] = _renamed(scheduler, _SCHEDULER)
    if isinstance(data := found.get("data"), Mapping):
        found["data"] = _data_settings(data)
    return found


def _data_settings(data: Mapping[str, Any]) -> Record:
    """The settings of data with today's `_target_`."""
    target = data.get("_target_")
    known = isinstance(target, str) and target in DATA_MODULES
    return dict(data) | {"_target_": DATA_MODULES[str(target)]} if known else dict(data)


def _move_to_their_groups(config: dict[str, Any]) -> None:
    """Move num_heads from the group model to mixer, and learning_rate from model to optimizer.lr. Earlier versions
    recorded them in the group model, to which the two other options referred."""
    heads, rate = config["model"].pop("num_heads", None), config["model"].pop("learning_rate", None)
    if config["mixer"].get("num_heads") is None and heads is not None:
        config["mixer"]["num_heads"] = heads
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("lr") is None and rate is not None:
        optimizer["lr"] = rate


def current_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a saved model as `build_model` takes it today. The model computes the same as before."""
    if not isinstance(config.get("mixer"), Mapping):
        return dict(config)
    later = later_options({"mixer": config["mixer"], "model": config})
    of_mixers = {name: value for name, value in later.items() if name.startswith("mixer.")}
    return _without_filters(with_options(config, of_mixers))


def _without_filters(model: dict[str, Any]) -> dict[str, Any]:
    """`model` without `init.conv_std`, which is an option of the mixers today."""
    init = model.get("init")
    if not isinstance(init, Mapping) or "conv_std" not in init:
        return model
    return {**model, "init": {name: value for name, value in init.items() if name != "conv_std"}}


def translated_results(found: Record) -> Record:
    """The content of a results file with the keys of today; equal where it has no old ones.

    Raises: KeyError, TypeError, AttributeError or RecursionError where it does not have the form of its kind.
    """
    found = _with_one_thread(found)
    translate = {
        "benchmark": _benchmark,
        "comparison": _comparison,
        "state_error": lambda found: found | {"rows": [_renamed(row, _OF_STATE_ERRORS) for row in found["rows"]]},
        "peer_training": _peer_training,
        "evaluation": _evaluation,
        "long_context": _evaluations,
        "state_dtypes": _evaluations,
        "table": _table,
    }.get(str(found.get("kind")))
    return translate(found) if translate else found


def translated_summary(summary: Record) -> Record:
    """summary.json of a run: its "parts", flat records, are now "val_subsets", which say what describes a subset."""
    if isinstance(summary.get("device"), str):
        summary = summary | {"device": _with_one_thread(summary["device"])}
    if "parts" not in summary:
        return summary
    subsets = []
    for part in summary["parts"]:
        subset = {name: part[name] for name in part if name in _DESCRIBE_A_SUBSET}
        measured = {name: value for name, value in part.items() if name not in subset}
        subsets.append({"name": _subset_name(subset), "subset": subset, **measured})
    return _renamed(summary | {"parts": subsets}, {"parts": "val_subsets"})


def _with_one_thread(found: Any) -> Any:
    """Earlier versions wrote "cpu, 1 threads", also in the note of a table."""
    if isinstance(found, dict):
        return {name: _with_one_thread(value) for name, value in found.items()}
    if isinstance(found, list):
        return [_with_one_thread(value) for value in found]
    return found.replace(", 1 threads", ", 1 thread") if isinstance(found, str) else found


def with_data_name(summary: Record, config: Mapping[str, Any]) -> Record:
    """The summary of a run with the settings `config`, with today's name of its data."""
    return summary | {"data": data_name(str(summary["data"]), config)} if "data" in summary else summary


def _subset_name(subset: Mapping[str, int]) -> str:
    return "_".join(f"{name}_{value}" for name, value in subset.items())


def _renamed(record: Mapping[str, Any], names: Mapping[str, str]) -> Record:
    return {names.get(name, name): value for name, value in record.items()}


def _table(found: Record) -> Record:
    """A table may have the list "commands", which made it."""
    if "commands" not in found:
        return found
    return found | {"commands": [_command(line) for line in found["commands"]]}


def _command(line: str) -> str:
    """A command that runs a module of _COMMANDS, with today's name of the module."""
    return " ".join(_COMMANDS.get(word, word) for word in line.split(" "))


def _benchmark(found: Record) -> Record:
    return found | {"rows": [_benchmark_row(row) for row in found["rows"]]}


def _benchmark_row(row: Record) -> Record:
    row = _renamed(row, _OF_BENCHMARK_ROWS)
    if row.get("peer") in _PEERS:
        row["peer"] = _PEERS[row["peer"]]
    if "noisy" not in row and row.get("ms_median"):
        row["noisy"] = row["ms_p80"] - row["ms_p20"] > _LARGEST_SPREAD * row["ms_median"]
    return row


def _comparison(found: Record) -> Record:
    found = _renamed(found, _OF_COMPARISONS)
    runs = found["runs"]
    found["runs"] = [_run(run) for run in runs]
    renamed = {
        before["summary"]["data"]: after["summary"]["data"]
        for before, after in zip(runs, found["runs"], strict=True)
        if before["summary"].get("data") != after["summary"].get("data")
    }
    found["rows"] = [_comparison_row(row, renamed) for row in found["rows"]]
    if "benchmark" in found:  # there was one file at most, of operators
        one = found.pop("benchmark")
        found["benchmarks"] = [{"name": "benchmark.json", "kind": "benchmark", **one}] if one else []
    translated = [one | translated_results(one) for one in found["benchmarks"]]
    return found | {"benchmarks": translated}


def _run(run: Record) -> Record:
    summary = with_data_name(translated_summary(run["summary"]), run["config"])
    return run | {"config": _with_todays_names(run["config"]), "summary": summary}


def _comparison_row(row: Record, data_names: Mapping[str, str]) -> Record:
    """The entry "mixer" is the label of a group, which names its data where they differ between the groups."""
    row = _renamed(row, _OF_COMPARISON_ROWS)
    if data_names and "mixer" in row:
        row["mixer"] = " · ".join(data_names.get(word, word) for word in str(row["mixer"]).split(" · "))
    return row


def _peer_training(found: Record) -> Record:
    peers = [peer | {"settings": _with_todays_names(peer["settings"])} for peer in found["peers"]]
    return found | {"peers": peers}


def _evaluations(found: Record) -> Record:
    return found | {"evaluations": [_evaluation(record) for record in found["evaluations"]]}


def _evaluation(record: Record) -> Record:
    """Earlier versions wrote "accuracy/length_256_pairs_64" where there is a list "val_subsets" today, and "parts" for
    the subsets that the model's checkpoint describes."""
    record = {**record}  # a TypeError if it is none
    data = record.get("data")
    if isinstance(run := record.get("run"), Mapping):
        record["run"] = with_data_name(_renamed(run, _OF_CHECKPOINTS), {"data": data})
    if isinstance(data, Mapping):
        record["data"] = _data_settings(data)
    result: Record = {}
    subsets: dict[str, Record] = {}
    for key, value in record["result"].items():
        match = _SUBSET_OF_RESULT.fullmatch(key)
        if match is None:
            result[key] = value
            continue
        metric, name = match.groups()
        words = name.split("_")
        subset = {word: int(number) for word, number in zip(words[::2], words[1::2], strict=True)}
        subsets.setdefault(name, {"name": name, "subset": subset})[metric] = value
    if subsets:
        result["val_subsets"] = list(subsets.values())
    return record | {"result": result}


def main(paths: list[str]) -> None:
    """Rewrites results files whose keys are old."""
    for path in map(Path, paths):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            translated = translated_results(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SystemExit(f"error: {path} is not a results file ({error}).") from None
        if translated != found:
            write_atomically(path, json.dumps(translated, indent=1) + "\n")
            print(f"{path}: rewritten")


if __name__ == "__main__":
    main(sys.argv[1:])
