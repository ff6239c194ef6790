"""The whole set of `scripts/benchmark.py task=all`: operators, layers, training steps, prefill and decoding, in parts.

Each part is a benchmark with fixed options, in a directory of its own. A part that is complete is not measured again,
so the same command with the same `out` goes on where it stopped. In `out`, parts.json holds the state, and
whole_set.json all results.
"""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lkda.checks import InputError, refusing_damage
from lkda.commands.benchmarks.step_benchmark import open_console
from lkda.commands.command_line.errors import CommandError
from lkda.commands.command_line.invocation import command
from lkda.commands.command_line.overrides import override
from lkda.device import device_name
from lkda.io import write_atomically
from lkda.report.read.files import read_results_file
from lkda.report.tradeoff.measurements import find_results
from lkda.report.tradeoff.report import write_whole_set

STATE, RESULT = "parts.json", "whole_set.json"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A benchmark of the set.

    Attributes:
        name: of its directory in `out`.
        task: op, step, decode or notes.
        options: of configs/benchmark.yaml, where they differ from the defaults.
        minutes: the estimate before anything was measured.
    """

    name: str
    task: str
    options: Mapping[str, Any]
    minutes: float


_MIXERS = ["kda", "simplified", "softmax", "mla", "kda_softmax_3to1", "kda_mla_3to1"]
# A peer that compiles for minutes must not cost the others their time.
_STEPS = {"models": ["small"], "mixers": _MIXERS, "bare": False, "steps": 30, "time_limit": 90}
_DECODE = {"models": ["small"], "dtypes": ["bf16"], "time_limit": 60}
# The kernels have 128K tokens at every length, so that a curve over the length shows how the cost of a token grows.
_LENGTHS = ["128x1024x16x64", "16x8192x16x64", "4x32768x16x64", "1x131072x16x64"]
_CONTEXTS = [1024, 8192, 32_768, 131_072]
# In an order in which the first parts alone answer most: each stage, for all mixers. The notes come after the decoding,
# which their claims refer to. FLA tunes its kernels for minutes at each size of a head, so it is measured at one shape.
ON_GPU = (
    Part(
        "operators",
        "op",
        {"ops": ["kda", "simplified"], "shapes": _LENGTHS, "backends": ["cuda"], "gates": ["slow"]}
        | {"peers": [f"fla@{_LENGTHS[1]}", "cudnn", "sdpa"]},
        3.3,
    ),
    Part("decode", "decode", {**_DECODE, "mixers": _MIXERS, "batches": [1], "contexts": _CONTEXTS, "prefill": True}, 3),
    Part("steps_16k", "step", {**_STEPS, "shapes": ["1x16384"]}, 2.2),
    Part("decode_batch", "decode", {**_DECODE, "mixers": _MIXERS, "batches": [256], "contexts": [1024, 8192]}, 1),
    Part("steps_2k", "step", {**_STEPS, "shapes": ["8x2048"], "peers": ["llama", "fla_kda"]}, 5.6),
    Part("notes", "notes", {}, 1.5),
    Part(
        "layers",
        "op",
        {"ops": ["kda_layer", "kda_gate", "short_conv", "gated_norm"], "shapes": ["8x2048x16x64", "1x8192x16x128"]}
        | {"backends": ["cuda"], "peers": ["fla@8x2048x16x64"], "replays": ["graph"]},
        2,
    ),
    Part("steps_8k", "step", {**_STEPS, "shapes": ["2x8192"], "peers": ["llama"]}, 3.7),
    Part(
        "decode_peers",
        "decode",
        {**_DECODE, "mixers": ["kda", "softmax"], "batches": [1], "contexts": [1024], "peers": ["transformers", "fla"]},
        2.7,
    ),
)
_SMALL = {"models": ["tiny"], "mixers": ["kda", "simplified", "softmax"], "vocab_size": 1024}
_STEPS_ON_CPU = {**_SMALL, "compile": False, "bare": False, "steps": 10}
_LAYERS_ON_CPU = {"shapes": ["1x1024x2x32"], "dtypes": ["fp32"], "replays": ["eager"]}
ON_CPU = (
    Part(
        "operators",
        "op",
        {"ops": ["kda", "simplified"], "shapes": ["8x256x2x32", "2x1024x2x32", "1x2048x2x32"], "dtypes": ["fp32"]}
        | {"backends": ["chunk"], "gates": ["slow"], "peers": ["sdpa", "fla"], "replays": ["eager"]},
        0.5,
    ),
    Part("layers", "op", {**_LAYERS_ON_CPU, "ops": ["kda_layer"], "backends": ["chunk"]}, 0.3),
    Part(
        "layer_pieces",
        "op",
        {**_LAYERS_ON_CPU, "ops": ["kda_gate", "short_conv", "gated_norm"], "backends": ["torch"]},
        0.2,
    ),
    Part("steps", "step", {**_STEPS_ON_CPU, "shapes": ["4x256"], "peers": ["llama", "fla_kda"]}, 1.5),
    Part("steps_1k", "step", {**_STEPS_ON_CPU, "shapes": ["1x1024"]}, 1),
    Part(
        "decode",
        "decode",
        {**_SMALL, "dtypes": ["fp32"], "batches": [1], "contexts": [256, 1024, 4096], "prefill": True},
        2,
    ),
    Part(
        "decode_peers",
        "decode",
        {**_SMALL, "mixers": ["softmax"], "dtypes": ["fp32"], "batches": [1], "contexts": [256]}
        | {"peers": ["transformers", "fla"]},
        1.5,
    ),
)


def parts_of(device: torch.device) -> Sequence[Part]:
    """The whole set on a GPU, or the smaller one on a CPU."""
    return ON_GPU if device.type == "cuda" else ON_CPU


def measure_whole_set(
    settings: Settings, device: torch.device, measure: Callable[[Settings], None], parts: Sequence[Part] | None = None
) -> None:
    """Measure the parts that are not complete, and write report.html and its tables into `out`.

    Args:
        settings: resolved, with the defaults of every option, `out` and `minutes`.
        measure: measures one part, with its settings.
        parts: those of the device where None.
    Raises:
        InputError: `out` holds the results of another device, is not a directory of a whole set, or cannot be written.
        CommandError: parts failed; the others are measured.
    """
    parts = parts_of(device) if parts is None else parts
    out, limit = Path(settings["out"]), settings["minutes"]
    console = open_console()
    done = _read_state(out, device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the directory {out}: {error.strerror}.") from error
    waiting = [part for part in parts if part.name not in done]
    for part in parts:
        if part.name in done:
            console.print(f"{part.name}: complete, not measured again")
    begun = time.perf_counter()
    failed: dict[str, str] = {}
    measured = False
    for part in waiting:
        pace = _pace(parts, done)
        spent = (time.perf_counter() - begun) / 60
        # The pace of the parts before says little of this one where it is a faster one: they may have lacked a peer.
        if limit is not None and measured and spent + part.minutes * max(pace, 1.0) > limit:
            continue  # a shorter one may still fit
        measured = True
        left = sum(other.minutes for other in parts if other.name not in {*done, *failed}) * pace
        console.print(
            f"{_bar(len({*done, *failed}), len(parts))} {part.name}, about {_minutes(part.minutes * pace)}; "
            f"all that is left, about {_minutes(left)}"
        )
        started = time.perf_counter()
        try:
            measure({**settings, **part.options, "task": part.task, "out": str(out / part.name)})
        except (InputError, CommandError) as error:
            failed[part.name] = str(error)
            console.print(f"{part.name} failed: {error}", soft_wrap=True)
        except Exception as error:  # of any package, such as too little memory: the other parts are still measured
            failed[part.name] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            console.print(f"{part.name} failed:\n{traceback.format_exc()}", soft_wrap=True)
        except KeyboardInterrupt:
            _write_page(console, out, parts, done)
            console.print(f"stopped in the part {part.name}; continue with: {_again(out)}", soft_wrap=True)
            raise
        else:
            done[part.name] = time.perf_counter() - started
            _write_state(out, device, done)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the processes of the next part need the memory
    _finish(console, out, parts, done, failed)


def _pace(parts: Sequence[Part], done: Mapping[str, float]) -> float:
    """How much longer than estimated the complete parts took."""
    known = [part for part in parts if part.name in done]
    return sum(done[part.name] for part in known) / 60 / sum(part.minutes for part in known) if known else 1.0


def _bar(complete: int, total: int) -> str:
    return f"[{'#' * complete}{'.' * (total - complete)}] part {complete + 1} of {total}:"


def _minutes(minutes: float) -> str:
    return f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"


def _read_state(out: Path, device: torch.device) -> dict[str, float]:
    """The seconds of each complete part. Raises: InputError where `out` is of another device or of something else."""
    path = out / STATE
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"out={out} is not empty and holds no {STATE}: give a new directory, or that of a whole set."
            )
        return {}
    found = read_results_file(path, kind="measurements")
    if found.get("device") != device_name(device):
        here = device_name(device)
        raise InputError(f"out={out} holds results of {found.get('device')}, and this is {here}: give a new directory.")
    with refusing_damage(path):
        done = {str(name): float(seconds) for name, seconds in found["parts"].items()}
    return {name: seconds for name, seconds in done.items() if any((out / name).glob("*.json"))}  # one may be removed


def _write_state(out: Path, device: torch.device, done: Mapping[str, float]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    state = {"kind": "measurements", "device": device_name(device), "date": now, "parts": done}
    write_atomically(out / STATE, json.dumps(state, indent=1) + "\n")


def _finish(
    console: Console, out: Path, parts: Sequence[Part], done: Mapping[str, float], failed: Mapping[str, str]
) -> None:
    """Write the page of what was measured, and say what is missing."""
    _write_page(console, out, parts, done)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise CommandError(f"not measured: {reasons} What is missing is measured again by: {_again(out)}")
    if any(part.name not in done for part in parts):
        console.print(f"the other parts are measured by: {_again(out)}", soft_wrap=True)
    else:
        joined = command("compare", "runs=GLOB", override("bench", str(out)))
        console.print(f"join it with runs: {joined}", soft_wrap=True)


def _write_page(console: Console, out: Path, parts: Sequence[Part], done: Mapping[str, float]) -> None:
    """Write the page and the results of the complete parts, if there is one."""
    complete = [out / part.name for part in parts if part.name in done]
    if complete:
        write_whole_set(find_results(complete), out / RESULT, title="Which mixer is fastest")
        taken = sum(done.values()) / 60
        page = out / "report.html"
        console.print(
            f"\n{len(complete)} of {len(parts)} parts in {taken:.1f} min; the page is {page}.", soft_wrap=True
        )


def _again(out: Path) -> str:
    return command("benchmark", override("out", str(out)))
