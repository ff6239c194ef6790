"""Reads the results files of `scripts/benchmark.py` into one kind of record, whatever was measured."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.report.draw.units import length
from lkda.report.operators.benchmark import why_not
from lkda.report.operators.plots import SOFTMAX
from lkda.report.read.files import OtherFileError, read_results_file
from lkda.report.studies import notes

KINDS = ("benchmark", "step_benchmark", "decode", "notes")
WHOLE_SET = "whole_set"  # the results of several such files, as scripts/benchmark.py without options writes them
STAGES = ("kernel", "layer", "training step", "prefill", "decode")
LARGEST_SPREAD = 0.2  # of repeated measurements, as a share; one with a larger spread is noisy
OF_MODELS = ("training step", "prefill", "decode")
Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The content of a results file of scripts/benchmark.py, and its name."""

    name: str
    kind: str
    header: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True)
class Measurement:
    """One speed, or the reason why there is none.

    Attributes:
        stage: one of STAGES, or "other operator".
        mixer: what it computes, as in "kda".
        series: the mixer, with what tells it from other measurements of the mixer: the gate, a backend or a package.
        model: a choice of configs/model; empty for operators.
        setting: what must be equal for two speeds to be compared, in words.
        context: tokens of a sequence.
        tokens_per_s: None where nothing was measured.
        memory: bytes: of the state of one sequence when decoding, else the peak.
        reason: why nothing was measured.
        file, command: where it is recorded, and how to measure it again.
        own: whether it is lkda's implementation; a kernel of softmax attention is that of PyTorch, which lkda calls.
        peer: whether it is an implementation of another package, other than a kernel of softmax attention.
        noisy: whether repeated measurements differ by more than `lkda.bench.timing` takes for steady.
        forward_tokens_per_s: of prefill, the speed of a forward pass of a large batch in the same process.
        vocab_size: of the model.
    """

    stage: str
    mixer: str
    series: str
    model: str
    setting: str
    device: str
    context: int
    tokens_per_s: float | None
    memory: float | None
    reason: str
    file: str
    command: str
    own: bool = True
    peer: bool = False
    noisy: bool = False
    forward_tokens_per_s: float | None = None
    vocab_size: int | None = None

    @property
    def where(self) -> str:
        """Setting and device: measurements that are equal in this are compared."""
        return f"{self.setting}, {self.device}" if self.setting else self.device


def find_results(paths: Sequence[Path]) -> list[Results]:
    """Reads results files; of a directory, all files of these kinds that lie in it or below, or a whole set's file.
    Files in it that cannot be read are left out; `damaged_files` names them.

    Raises: InputError where a path is not there, a file is of another kind or lacks what its kind holds, or a directory
        holds none.
    """
    found: dict[Path, list[Results]] = {}
    for path in paths:
        if not path.is_dir():
            found[path.resolve()] = _read(path)
            continue
        kinds, damaged = _files_of(path)
        files = [file for file, kind in kinds.items() if kind in KINDS]
        files = files or [file for file, kind in kinds.items() if kind == WHOLE_SET]
        if not files:
            reasons = ": " + "; ".join(f"{file} {reason}" for file, reason in damaged.items()) if damaged else "."
            raise InputError(f"bench={path} holds no results of scripts/benchmark.py ({', '.join(KINDS)}){reasons}")
        found |= {file.resolve(): _read(file) for file in files}
    return [result for results in found.values() for result in results]


def damaged_files(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The JSON files in or below these directories that cannot be read and that `find_results` therefore leaves out,
    with the reasons."""
    found = {file: reason for path in paths if path.is_dir() for file, reason in _files_of(path)[1].items()}
    return list(found.items())


def _files_of(directory: Path) -> tuple[dict[Path, str], dict[Path, str]]:
    """The kinds of the results files in or below a directory, and the reasons why others cannot be read."""
    kinds, damaged = {}, {}
    for file in sorted(directory.rglob("*.json")):
        try:
            kinds[file] = str(read_results_file(file)["kind"])
        except OtherFileError:  # such as a log of another program
            continue
        except InputError as error:
            damaged[file] = str(error).removeprefix(f"{file} ")
    return kinds, damaged


def _read(path: Path) -> list[Results]:
    """The results of a file: one, or those of a whole set."""
    found = read_results_file(path)
    if found["kind"] not in (*KINDS, WHOLE_SET):
        raise InputError(f"{path} is of the kind {found['kind']}, and one of {', '.join(KINDS)} is needed.")
    try:
        if found["kind"] == WHOLE_SET:
            results = [Results(**result) for result in found["benchmarks"]]
        else:
            name = f"{path.parent.name}/{path.name}"
            results = [Results(name, found["kind"], dict(found["header"]), list(found["rows"]))]
        for one in measurements(results):
            _check(one)
        for result in results:
            if result.kind == notes.KIND:
                notes.tables({"header": result.header, "rows": result.rows}, [])
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not what scripts/benchmark.py writes ({error!r}).") from error
    if not all(result.rows for result in results):
        raise InputError(f"{path} is not what scripts/benchmark.py writes (it has no rows).")
    return results


def _check(one: Measurement) -> None:
    """Raises: ValueError or TypeError where a number cannot be drawn, such as a speed that is not a number."""
    for name, least in (("context", 1), ("tokens_per_s", 5e-324), ("memory", 0)):  # the smallest number above 0
        value = getattr(one, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ValueError(f"{one.stage} of {one.series}: {name} is {value}")


def measurements(results: Sequence[Results]) -> list[Measurement]:
    """The records of all files. Where two are of the same thing, the later one with a speed is kept."""
    readers = {"benchmark": _operators, "step_benchmark": _steps, "decode": _decoding, "notes": _nothing}
    found: dict[tuple[Any, ...], Measurement] = {}
    everything = []
    for result in sorted(results, key=lambda result: str(result.header.get("date", ""))):
        device = str(result.header.get("device", "an unnamed device"))
        everything += [(row, measurement) for row, measurement in readers[result.kind](result, device)]
    for measurement in _with_batches(_told_apart(everything)):
        key = (measurement.stage, measurement.series, measurement.model, measurement.where, measurement.context)
        if key not in found or measurement.tokens_per_s is not None:
            found[key] = measurement
    order = {stage: n for n, stage in enumerate(STAGES)}
    return sorted(found.values(), key=lambda one: (order.get(one.stage, 9), one.where, one.series, one.context))


Read = list[tuple[Row, Measurement]]


def _operators(result: Results, device: str) -> Read:
    """A replayed CUDA graph measures the device alone, so where there is one, the eager call is left out."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in sorted(result.rows, key=lambda row: row["replay"] == "graph"):
        key = tuple(row.get(name) for name in ("op", "B", "T", "H", "D", "dtype", "gate", "backend", "peer", "mode"))
        if key not in kept or row.get("ms_median"):
            kept[key] = row
    return [(row, _operator(row, result, device)) for row in kept.values()]


def _operator(row: Row, result: Results, device: str) -> Measurement:
    peer, op = row.get("peer"), str(row["op"])
    softmax = peer == SOFTMAX
    mixer = "softmax" if softmax else op.removesuffix("_layer")
    stage = "layer" if op.endswith("_layer") else "kernel" if mixer in ("kda", "simplified", "softmax") else ""
    gate = f", {row['gate']} decay" if row.get("gate") and not softmax else ""
    who = "SDPA" if softmax else peer or (f"lkda {row['backend']}" if row["backend"] != "cuda" else "")
    shape = "x".join(str(row[axis]) for axis in "BTHD")
    time = row.get("ms_median")
    words = ["task=op", f"ops=[{op}]", f"shapes=[{shape}]", f"dtypes=[{row['dtype']}]", f"modes=[{row['mode']}]"]
    # The default backends are not those of every operator, and cuda is.
    words += [f"replays=[{row['replay']}]", f"backends=[{row['backend'] or 'cuda'}]"]
    words += [f"gates=[{row['gate']}]"] if row.get("gate") else []
    words += [f"peers=[{'sdpa' if softmax else str(peer).split()[0]}]"] if peer else []
    return Measurement(
        stage=stage or "other operator",
        mixer=mixer,
        series=mixer + gate + (f", {who}" if who else ""),
        model="",
        setting=f"{row['mode']}, {row['H']} heads of {row['D']}, {row['dtype']}",
        device=device,
        context=int(row["T"]),
        tokens_per_s=1000 * row["B"] * row["T"] / time if time else None,
        memory=row["peak_mib"] * 2**20 if row.get("peak_mib") else None,
        reason="" if time else why_not(row) or "not measured",
        file=result.name,
        command=_command(words),
        own=softmax or (peer is None and row["backend"] == "cuda"),
        peer=peer is not None and not softmax,
        noisy=bool(row.get("noisy")),
    )


def _nothing(result: Results, device: str) -> Read:
    """The table of the notes is shown as it is; its shapes are those of the notes."""
    return []


def _steps(result: Results, device: str) -> Read:
    return [(row, _step(row, result, device)) for row in result.rows]


def _step(row: Row, result: Results, device: str) -> Measurement:
    bare = row["implementation"] == "bare"
    overrides = f", {' '.join(row['overrides'])}" if row.get("overrides") else ""
    words = ["task=step", f"models=[{row['model']}]", f"mixers=[{row['mixer']}]", f"shapes=[{row['B']}x{row['T']}]"]
    words += ["packed=[true]"] if row["packed"] else []
    words += [] if row["implementation"] in ("train", "bare") else [f"peers=[{_peer(row)}]"]
    words += [] if row.get("compile", "auto") == "auto" else [f"compile={str(row['compile']).lower()}"]
    return Measurement(
        stage="training step",
        mixer=str(row["mixer"]),
        series=f"{row['mixer']}, bare loop" if bare else str(row["title"]),
        model=str(row["model"]),
        setting=f"{row['model']}, {_precision(row, device)}{', packed' * bool(row['packed'])}{overrides}",
        device=device,
        context=int(row["T"]),
        tokens_per_s=row.get("tokens_per_s"),
        memory=row["reserved_gib"] * 2**30 if row.get("reserved_gib") else None,
        reason=why_not(row),
        file=result.name,
        command=_command([*words, *_further(row)]),
        own=row["implementation"] == "train",
        peer=row["implementation"] not in ("train", "bare"),
        noisy=(row.get("noise") or 0) > LARGEST_SPREAD,
        vocab_size=row.get("vocab_size"),
    )


def _precision(row: Row, device: str) -> str:
    """Of the training. Earlier rows do not have it: without a setting of theirs it was the default of the device."""
    given = [word.partition("=")[2] for word in row.get("overrides") or () if word.startswith("trainer.precision=")]
    on_cpu = device == "cpu" or device.endswith((" thread", " threads"))
    return str(row.get("precision") or (given[-1] if given else "32-true" if on_cpu else "bf16-mixed"))


def _decoding(result: Results, device: str) -> Read:
    return [(row, _decode(row, result, device)) for row in result.rows]


def _decode(row: Row, result: Results, device: str) -> Measurement:
    prefill = row["implementation"] == "prefill"
    title = str(row["title"]).removesuffix(", prefill")
    words = ["task=decode", f"models=[{row['model']}]", f"mixers=[{row['mixer']}]", f"dtypes=[{row['dtype']}]"]
    words += [f"batches=[{row['batch']}]", f"contexts=[{row['context']}]", *(["prefill=true"] if prefill else [])]
    words += [] if row["implementation"] in ("lkda", "prefill") else [f"peers=[{_peer(row)}]"]
    words += [f"state_dtypes=[{row['state_dtype']}]"] if row.get("state_dtype") not in (None, "float32") else []
    words += [f"top_p={row['top_p']}"] if row.get("top_p") is not None else []
    overrides = f", {' '.join(row['overrides'])}" if row.get("overrides") else ""
    sampled = f", top_p {row['top_p']}" if row.get("top_p") is not None else ""
    return Measurement(
        stage="prefill" if prefill else "decode",
        mixer=str(row["mixer"]),
        series=title,
        model=str(row["model"]),
        setting=f"{row['model']}, {row['dtype']}, batch {row['batch']:,}{sampled}{overrides}",
        device=device,
        context=int(row["context"]),
        tokens_per_s=row.get("tokens_per_s"),
        memory=row.get("peak_bytes") if prefill else row.get("bytes_per_sequence"),
        reason=why_not(row),
        file=result.name,
        command=_command([*words, *_further(row)]),
        own=row["implementation"] in ("lkda", "prefill"),
        peer=row["implementation"] not in ("lkda", "prefill"),
        forward_tokens_per_s=row.get("forward_tokens_per_s") if prefill else None,
        vocab_size=row.get("vocab_size"),
    )


def _peer(row: Row) -> str:
    """The name by which the command knows the peer: "llama" of llama_compiled."""
    return next(
        (name for name in ("llama", "fla_kda", "transformers", "fla") if row["implementation"].startswith(name)),
        str(row["implementation"]),
    )


def _further(row: Row) -> list[str]:
    words = [f"vocab_size={row['vocab_size']}"] if row.get("vocab_size") else []
    return words + ([f"overrides=[{','.join(row['overrides'])}]"] if row.get("overrides") else [])


def _command(words: Sequence[str]) -> str:
    """For any shell; some take brackets for names of files."""
    return f"python scripts/benchmark.py {shlex.join(words)}"


# Settings of whole models that a setting in words does not have, unless measurements differ in them.
_FURTHER: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("vocab_size", "vocabulary {:,}".format),
    ("compile", "compile {}".format),
)


def _told_apart(found: Read) -> Read:
    """Adds a further setting where speeds that would be compared differ in it."""
    for key, write in _FURTHER:
        values: dict[tuple[str, str], set[Any]] = defaultdict(set)
        for row, one in found:
            values[one.stage, one.where].add(row.get(key))
        found = [
            (row, replace(one, setting=f"{one.setting}, {write(row[key])}"))
            if len(values[one.stage, one.where]) > 1 and row.get(key) is not None
            else (row, one)
            for row, one in found
        ]
    return found


def _with_batches(found: Read) -> list[Measurement]:
    """Adds the size of the batch to the settings of operators and steps.

    Lengths are compared at the same number of tokens of a batch; where that gives a single length and the same number
    of rows gives several, at that.
    """
    sized = [(row, one) for row, one in found if one.stage not in ("prefill", "decode")]
    by_tokens = _lengths(sized, lambda row: row["B"] * row["T"])
    by_rows = _lengths(sized, lambda row: row["B"])
    written = []
    for row, one in found:
        if one.stage in ("prefill", "decode"):
            written.append(one)
            continue
        tokens, rows = (one.stage, one.where, row["B"] * row["T"]), (one.stage, one.where, row["B"])
        by_row = len(by_tokens[tokens]) == 1 and len(by_rows[rows]) > 1
        size = (
            f"{row['B']:,} row{'s' * (row['B'] != 1)}" if by_row else f"{length(row['B'] * row['T'])} tokens per batch"
        )
        written.append(replace(one, setting=f"{one.setting}, {size}"))
    return written


def _lengths(found: Read, size: Callable[[Mapping[str, Any]], int]) -> dict[tuple[str, str, int], set[int]]:
    lengths: dict[tuple[str, str, int], set[int]] = defaultdict(set)
    for row, one in found:
        lengths[one.stage, one.where, size(row)].add(one.context)
    return lengths


def series(found: Sequence[Measurement], *, value: str) -> dict[tuple[str, str, str, str], list[tuple[float, float]]]:
    """Curves over the context: (stage, where, mixer, series) -> [(context, value)], of what has the value."""
    curves: dict[tuple[str, str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in found:
        measured = getattr(one, value)
        if measured:
            curves[one.stage, one.where, one.mixer, one.series].append((one.context, measured))
    return {name: sorted(points) for name, points in curves.items()}
