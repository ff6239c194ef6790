"""Results files of earlier versions, as they would be written today. Keys and names change, numbers never.

The committed files were rewritten with `python -m lkda.report.read.old_keys docs/results/*/*.json`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lkda.io import write_atomically
from lkda.old_names import data_name

Record = dict[str, Any]

_OF_BENCHMARK_ROWS = {"floor_ms": "lower_bound_ms", "fraction_of_floor": "fraction_of_lower_bound"}
_OF_COMPARISONS = {"alone": "exclusive_device"}
_OF_COMPARISON_ROWS = {
    "bits_at_same_time": "bits_at_equal_wall_clock",
    "bits_at_same_time sd": "bits_at_equal_wall_clock sd",
}
_OF_STATE_ERRORS = {"kept": "state_dtype"}
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


def translated_results(found: Record) -> Record:
    """The content of a results file with the keys of today; equal where it has no old ones.

    Raises: KeyError, TypeError or AttributeError where it does not have the form of its kind.
    """
    translate = {
        "benchmark": _benchmark,
        "comparison": _comparison,
        "state_error": lambda found: found | {"rows": [_renamed(row, _OF_STATE_ERRORS) for row in found["rows"]]},
        "evaluation": _evaluation,
        "long_context": _evaluations,
        "state_dtypes": _evaluations,
    }.get(str(found.get("kind")))
    return translate(found) if translate else found


def translated_summary(summary: Record) -> Record:
    """summary.json of a run: its "parts", flat records, are now "val_subsets", which say what describes a subset."""
    if "parts" not in summary:
        return summary
    subsets = []
    for part in summary["parts"]:
        subset = {name: part[name] for name in part if name in _DESCRIBE_A_SUBSET}
        measured = {name: value for name, value in part.items() if name not in subset}
        subsets.append({"name": _subset_name(subset), "subset": subset, **measured})
    return _renamed(summary | {"parts": subsets}, {"parts": "val_subsets"})


def with_data_name(summary: Record, config: Mapping[str, Any]) -> Record:
    """The summary of a run with the settings `config`, with today's name of its data."""
    return summary | {"data": data_name(str(summary["data"]), config)} if "data" in summary else summary


def _subset_name(subset: Mapping[str, int]) -> str:
    return "_".join(f"{name}_{value}" for name, value in subset.items())


def _renamed(record: Mapping[str, Any], names: Mapping[str, str]) -> Record:
    return {names.get(name, name): value for name, value in record.items()}


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
    return run | {"summary": with_data_name(translated_summary(run["summary"]), run["config"])}


def _comparison_row(row: Record, data_names: Mapping[str, str]) -> Record:
    """The entry "mixer" is the label of a group, which names its data where they differ between the groups."""
    row = _renamed(row, _OF_COMPARISON_ROWS)
    if data_names and "mixer" in row:
        row["mixer"] = " · ".join(data_names.get(word, word) for word in str(row["mixer"]).split(" · "))
    return row


def _evaluations(found: Record) -> Record:
    return found | {"evaluations": [_evaluation(record) for record in found["evaluations"]]}


def _evaluation(record: Record) -> Record:
    """Earlier versions wrote "accuracy/length_256_pairs_64" where there is a list "val_subsets" today."""
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SystemExit(f"error: {path} is not a results file ({error}).") from None
        if translated != found:
            write_atomically(path, json.dumps(translated, indent=1) + "\n")
            print(f"{path}: rewritten")


if __name__ == "__main__":
    main(sys.argv[1:])
