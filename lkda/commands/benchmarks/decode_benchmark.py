"""Measures decoding of whole models: `scripts/benchmark.py task=decode`. Each row is a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lkda.bench.decode import LEAST_CONTEXT
from lkda.bench.op_benchmark import DTYPES
from lkda.checks import InputError, check_count
from lkda.commands.benchmarks.decode_case import LKDA, PEERS, PREFILL, DecodeCase
from lkda.commands.benchmarks.row_process import measure_rows, run_fork
from lkda.commands.benchmarks.step_benchmark import check_names, choices, header_of, made_directory, open_console
from lkda.commands.command_line.errors import CommandError
from lkda.commands.run.run_setup import plan_run
from lkda.models.decoder import Sampling
from lkda.ops.kda.state import STATE_DTYPES
from lkda.report.draw.tables import rich_table
from lkda.report.studies import decode as report
from lkda.shipped import CONFIGS

RESULT = "decode.json"
# Settings of a model that are options of their own.
OPTIONS = {"model": "models", "mixer": "mixers", "model.vocab_size": "vocab_size"}
ROW = "lkda.commands.benchmarks.decode_row"


def decode_benchmark(settings: Mapping[str, Any], device: torch.device) -> None:
    """Measure every combination of models, mixers, state dtypes, contexts and batches. Writes decode.json, a table and
    plots into `out`.

    The JSON file is rewritten after every row. A row that fails, or whose states do not fit into the memory, holds the
    reason, and the others are still measured.

    Args:
        settings: resolved, composed from configs/benchmark.yaml.
    Raises:
        InputError: an unknown name, or a number outside its range.
        CommandError: no row could be measured.
    """
    cases = cases_of(settings, device)
    out = made_directory(Path(settings["out"]))
    console = open_console()
    found: dict[str, Any] = {"kind": report.KIND, "header": header_of(device), "rows": []}

    def measure(case: DecodeCase) -> dict[str, Any]:
        request = {"case": asdict(case), "device": str(device)}
        log = out / "logs" / f"{case.name}.txt"
        return {"title": case.title, **asdict(case), **run_fork(ROW, request, settings["time_limit"], log)}

    measure_rows(cases, measure, found, out / RESULT, console, said=lambda row: f"{row['tokens_per_s']:,.0f} tokens/s")
    report.redraw(out / RESULT)
    console.print(rich_table(*report.as_cells(found["rows"]), names=report.NAMES))
    console.print(f"\n{report.note(found)} JSON, tables, plots and logs are in {out}.")
    if not any("tokens_per_s" in row for row in found["rows"]):
        raise CommandError(f"nothing was measured: {found['rows'][0]['reason']}")


def cases_of(settings: Mapping[str, Any], device: torch.device) -> list[DecodeCase]:
    """The rows to measure: for each model, mixer and dtype of the weights, contexts with prefill, batches and peers.

    State dtypes are for models with KDA layers; other models, prefill and peers are measured once.

    Raises: InputError for an unknown name, a number outside its range, or a model that cannot be made.
    """
    _check(settings)
    shared = {"vocab_size": settings["vocab_size"], "overrides": list(settings["overrides"])}
    cases: list[DecodeCase] = []
    GlobalHydra.instance().clear()  # the configuration of scripts/benchmark.py is composed already
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for model, mixer, dtype in product(settings["models"], settings["mixers"], settings["dtypes"]):
            case = DecodeCase(LKDA, model, mixer, dtype, None, 1, LEAST_CONTEXT, settings["top_p"], **shared)
            plan = plan_run(compose("train", overrides=case.train_overrides(device)), Path("."))
            has_state = "kda" in plan.model["mixer"]["pattern"]
            states = list(settings["state_dtypes"]) if has_state else [None]
            for word, state, batch, context in _rows(settings, states):
                top_p = settings["top_p"] if word == LKDA else None
                cases.append(DecodeCase(word, model, mixer, dtype, state, batch, context, top_p, **shared))
    if list(settings["state_dtypes"]) != ["float32"] and all(case.state_dtype is None for case in cases):
        raise InputError(
            f"state_dtypes={list(settings['state_dtypes'])} is for models with KDA layers, and mixers="
            f"{list(settings['mixers'])} have none: leave it out."
        )
    return cases


def _rows(settings: Mapping[str, Any], states: Sequence[str | None]) -> Iterator[tuple[str, str | None, int, int]]:
    """(implementation, state dtype, batch, context) of the rows of one model."""
    for context in settings["contexts"]:
        if settings["prefill"]:
            yield PREFILL, states[0], 1, context
        for batch in settings["batches"]:
            for state in states:
                yield LKDA, state, batch, context
            for peer in settings["peers"]:
                for name in PEERS[peer]:
                    yield name, states[0], batch, context


def _check(settings: Mapping[str, Any]) -> None:
    for option in ("models", "mixers", "dtypes", "state_dtypes", "batches", "contexts"):
        if not settings[option]:
            raise InputError(f"{option} is empty: give some, or leave it out.")
    known = {"models": choices("model"), "mixers": choices("mixer"), "peers": list(PEERS), "dtypes": list(DTYPES)}
    for option, names in (known | {"state_dtypes": list(STATE_DTYPES)}).items():
        check_names("decode", option, settings[option], names)
    for batch in settings["batches"]:
        check_count("batches", batch, least=1)
    for context in settings["contexts"]:
        check_count("contexts", context, least=LEAST_CONTEXT)
    check_count("vocab_size", settings["vocab_size"], least=2)
    for override in settings["overrides"]:
        key = override.partition("=")[0].strip().lstrip("+~")
        instead = "state_dtypes" if key.endswith(".state_dtype") else OPTIONS.get(key)
        if instead is not None:
            raise InputError(f"overrides: {key} is what {instead}=... is for; a row would not be what it is called.")
    if settings["top_p"] is not None:
        Sampling(top_p=settings["top_p"])
