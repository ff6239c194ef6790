"""Measure the operators: time against the lower bound, error against float64, and both against other packages.

With task=step, training steps of whole models are measured instead; with task=decode, their decoding; with task=notes,
the table that the project began with; with task=all, everything. `lkda.commands.benchmarks` has a module for each of
these tasks: `step_benchmark`, `decode_benchmark`, `notes_benchmark` and `whole_set`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lkda.bench import measure, ops
from lkda.bench.op_benchmark import Shape
from lkda.checks import InputError, check_values
from lkda.commands.benchmarks.decode_benchmark import decode_benchmark
from lkda.commands.benchmarks.notes_benchmark import notes_benchmark
from lkda.commands.benchmarks.step_benchmark import check_against, step_benchmark
from lkda.commands.benchmarks.whole_set import measure_whole_set
from lkda.commands.settings.config import resolve
from lkda.commands.settings.unused_options import BENCHMARK, check_unused, given_options
from lkda.device import resolve_device
from lkda.io import write_atomically
from lkda.report.operators import report as bench_report
from lkda.report.operators.benchmark import KIND, Benchmark, as_rich

_WORDS = ("ops", "shapes", "dtypes", "backends", "peers", "modes", "replays")
MOST_MILLISECONDS = 600_000
OPTIONS = {
    "task": str | None,
    "minutes": float | None,
    **dict.fromkeys(_WORDS, Sequence[str]),
    "shapes": Sequence[str] | None,
    "gates": Sequence[str] | None,
    "device": str,
    "milliseconds": float,
    "out": Path,
    **dict.fromkeys(("models", "mixers", "overrides"), Sequence[str]),
    "packed": Sequence[bool],
    "vocab_size": int,
    "compile": bool | str,
    "steps": int,
    **dict.fromkeys(("bare", "cold"), bool),
    "time_limit": float,
    "check": Path | None,
    **dict.fromkeys(("batches", "contexts"), Sequence[int]),
    "state_dtypes": Sequence[str],
    "top_p": float | None,
    "prefill": bool,
}
TASKS = ("all", "op", "step", "decode", "notes")
# Options beside which a command line without a task measures the whole set; any other is of operators.
_OF_EVERYTHING = {"task", "device", "out", "minutes"}
# What `shapes` is if it is null: B x T x H x D of operators, B x T of steps.
_SHAPES = {"op": ["8x8192x16x64", "1x8192x8x64"], "step": ["8x2048"]}


def benchmark(config: DictConfig) -> None:
    """Measure what `config.task` names: operators, training steps or decoding of whole models, the notes, or all.

    Args:
        config: composed from configs/benchmark.yaml.
    Raises:
        InputError: for an unknown name, shape or device, an option without an effect, or if `out` cannot be written.
        CommandError: no row could be measured, or with `check` a row is slower than recorded.
    """
    settings = resolve(config)
    check_values(settings, OPTIONS)
    if settings["task"] is None:
        given = {name for name in given_options() if not name.startswith("hydra.")}
        settings["task"] = "op" if given - _OF_EVERYTHING else "all"
    if settings["task"] not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {settings['task']!r}.")
    check_unused(BENCHMARK, settings)
    if settings["minutes"] is not None and not settings["minutes"] > 0:
        raise InputError(f"minutes must be above 0, got {settings['minutes']}.")
    if not settings["time_limit"] > 0:
        raise InputError(f"time_limit must be above 0, in seconds for each row; got {settings['time_limit']}.")
    instead = "device=cpu" + (" with backends=[chunk,recurrent]" if settings["task"] == "op" else "")
    device = resolve_device(settings["device"], option="device", gpu="cuda", instead=instead)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    if settings["task"] == "all":
        measure_whole_set(settings, device, lambda part: _measure(part, device))
    else:
        _measure(settings, device)


def _measure(settings: dict[str, Any], device: torch.device) -> None:
    """Measure one task: operators, training steps, decoding or the notes."""
    _check_milliseconds(settings["milliseconds"])
    if settings["shapes"] is None and settings["task"] in _SHAPES:
        settings["shapes"] = _SHAPES[settings["task"]]
    if settings["task"] == "op":
        _benchmark_operators(settings, device)
    elif settings["task"] == "decode":
        decode_benchmark(settings, device)
    elif settings["task"] == "notes":
        notes_benchmark(settings, device)
    elif settings["check"] is None:
        step_benchmark(settings, device)
    else:
        check_against(settings, device)


def _check_milliseconds(milliseconds: float) -> None:
    if not 0 < milliseconds <= MOST_MILLISECONDS:
        raise InputError(
            f"milliseconds must be above 0 and at most {MOST_MILLISECONDS}, got {milliseconds}; it is the "
            "measuring time of each row."
        )


def _benchmark_operators(config: Mapping[str, Any], device: torch.device) -> None:
    """Measure every combination in `config`. Writes benchmark.json, tables, plots and a page into `out`.

    The JSON file is rewritten after every row, so a benchmark that is stopped keeps what it has measured.

    Args:
        config: resolved.
    Raises: InputError for an unknown name or shape, or if `out` cannot be written.
    """
    empty = [name for name in _WORDS if not config[name] and name != "peers"]
    if empty:
        raise InputError(f"{empty[0]} is empty: give some, or leave it out.")
    if device.type == "cpu" and list(config["replays"]) == ["graph"]:
        raise InputError("replays=[graph] needs a GPU, because it replays CUDA graphs: on a CPU use replays=[eager].")
    cases = measure.cases(
        [ops.find(name) for name in config["ops"]],
        [Shape.parse(text) for text in config["shapes"]],
        list(config["dtypes"]),
        list(config["backends"]),
        list(config["peers"]),
        list(config["modes"]),
        list(config["replays"]),
        None if config["gates"] is None else list(config["gates"]),
    )
    if not cases:
        raise InputError(
            "no combination of ops, shapes, dtypes, backends, peers, modes and replays can be measured: "
            "change one of them."
        )
    out = Path(config["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the directory {out}: {error.strerror}.") from error
    header = measure.header(device)
    rows: list[dict[str, Any]] = []
    terminal = Console(markup=False, emoji=False)
    console = terminal if terminal.is_terminal else Console(width=160, markup=False, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(cases))
        measured = measure.measure(cases, device, header["copy_gb_per_s"], milliseconds=config["milliseconds"])
        for case in cases:
            what = (
                f"{case.benchmark.op} {case.shape} {case.dtype} {case.gate or ''} {case.name} {case.mode} {case.replay}"
            )
            progress.update(task, description=what)
            rows.append(next(measured))
            found = {"kind": KIND, "header": header, "rows": rows}
            write_atomically(out / "benchmark.json", json.dumps(found, indent=1) + "\n")
            progress.advance(task)
    bench_report.write(Benchmark(header, rows), out)
    console.print(as_rich(rows))
    console.print(
        f"\n{header['device']}, copy {header['copy_gb_per_s']:,.0f} GB/s; JSON, tables, plots and a page are in {out}."
    )
