"""Measures training steps of whole models: `scripts/benchmark.py task=step`. Each row is a process of its own."""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

import lkda
from lkda.bench.measure import versions
from lkda.checks import InputError, check_count, check_types, check_values, refusing_damage
from lkda.commands.benchmarks.row_process import measure_rows, run_child, run_fork
from lkda.commands.benchmarks.step_clock import BLOCK_STEPS, PROFILED_STEPS
from lkda.commands.benchmarks.step_peers import BARE, TRAIN, VARIANTS, variant
from lkda.commands.command_line.errors import CommandError
from lkda.commands.run.run_setup import plan_run, require_one_device
from lkda.commands.run.summary import git_commit
from lkda.device import device_name
from lkda.report.draw.tables import rich_table
from lkda.report.read.files import read_results_file
from lkda.report.studies import step_benchmark as report
from lkda.shipped import CONFIGS

WARMUP_STEPS = 10
SLOWER = 0.05  # a row is slower than recorded if its tokens/s are lower by more than this share
RESULT = "step_benchmark.json"
ROW = "lkda.commands.benchmarks.step_row"
_PACKAGES = ("torch", "triton", "lightning", "transformers", "flash-linear-attention", "nvidia-cudnn-cu12")
# The caches of compiled code: of torch.compile, of Triton, of lkda's kernels, and of the CUDA driver.
_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LKDA_CACHE", "CUDA_CACHE_PATH")
_EVER = 1_000_000  # steps; longer than any measurement


@dataclass(frozen=True)
class StepCase:
    """A row of the benchmark before it is measured. A recorded row has all of these.

    Attributes:
        implementation: train, bare, or a variant of a peer; see `lkda.commands.benchmarks.step_row`.
        model, mixer: choices of configs/model and configs/mixer. A peer has the sizes of the model.
        B, T: rows of a batch, and tokens of a row.
        packed: whether rows are packed documents, or one document each.
        compile: as in configs/train.yaml.
        overrides: further settings of configs/train.yaml.
        steps: the number of timed optimizer steps.
    """

    implementation: str
    model: str
    mixer: str
    B: int
    T: int
    packed: bool
    vocab_size: int
    compile: bool | str
    overrides: Sequence[str]
    steps: int

    @property
    def name(self) -> str:
        """For messages and for the name of the log, as "small_kda_8x2048_train"."""
        packed = "_packed" if self.packed else ""
        what = f"{self.mixer}_{self.B}x{self.T}" if self.implementation in (TRAIN, BARE) else f"{self.B}x{self.T}"
        return f"{self.model}_{what}{packed}_{self.implementation}"

    @property
    def title(self) -> str:
        """For tables and plots."""
        own = {TRAIN: self.mixer, BARE: f"{self.mixer}, bare loop"}
        return own.get(self.implementation) or variant(self.implementation).title

    def train_overrides(self, device: torch.device) -> list[str]:
        """The overrides of configs/train.yaml with which this case is trained."""
        return [
            f"model={self.model}",
            f"mixer={self.mixer}",
            f"model.vocab_size={self.vocab_size}",
            "data=random",
            f"data.batch_size={self.B}",
            f"data.context={self.T}",
            f"data.packed={str(self.packed).lower()}",
            f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
            f"trainer.max_steps={_EVER}",
            f"trainer.val_check_interval={_EVER}",
            "trainer.limit_val_batches=1",
            f"trainer.log_every_n_steps={BLOCK_STEPS}",
            f"checkpoint.every_n_steps={_EVER}",
            "callbacks=none",
            "optimizer.lr=1e-4",  # the speed does not depend on it, and no model diverges
            f"compile={str(self.compile).lower()}",
            *self.overrides,
        ]


def step_benchmark(settings: Mapping[str, Any], device: torch.device) -> None:
    """Measure every combination of models, mixers and shapes. Writes step_benchmark.json, a table and plots into `out`.

    The JSON file is rewritten after every row. A row that fails holds the reason, and the others are still measured.

    Args:
        settings: resolved, composed from configs/benchmark.yaml.
    Raises: InputError for an unknown name or a number outside its range.
    """
    cases = cases_of(settings)
    _check_trainable(cases, device)
    out = made_directory(Path(settings["out"]))
    console = open_console()
    found = _measure_all(cases, settings, device, out, console)
    for packed in report.packings(found["rows"]):
        console.print(rich_table(*report.as_cells(found["rows"], packed=packed), names=report.NAMES))
        console.print()
    console.print(f"{report.note(found)} JSON, tables, plots and logs are in {out}.")
    if not any("tokens_per_s" in row for row in found["rows"]):
        raise CommandError(f"nothing was measured: {found['rows'][0]['reason']}")


def check_against(settings: Mapping[str, Any], device: torch.device) -> None:
    """Measure the rows of a recorded benchmark again: those of lkda, with the settings that they were recorded with.

    Args:
        settings: resolved. `check` is a directory with a step_benchmark.json, or such a file.
    Raises:
        InputError: the file cannot be used, or was recorded on another kind of device.
        CommandError: a row is slower than recorded by more than SLOWER, or cannot be measured any more.
    """
    path = Path(settings["check"])
    file = path / RESULT if path.is_dir() else path
    there, before = _recorded(file)
    here = device_name(device)
    if here != there:
        raise InputError(
            f"check={path} was recorded on {there}, and this is {here}: speeds of two kinds of device cannot be "
            f"compared. Run the check on {there}, or record these rows on this device: scripts/benchmark.py task=step."
        )
    if not before:
        raise InputError(f"check={path} holds no row of lkda with a speed: record one with task=step.")
    cases = [case for case, _ in before]
    _check_trainable(cases, device)
    if file.resolve() == (Path(settings["out"]) / RESULT).resolve():
        raise InputError(f"out={settings['out']} holds the recorded rows of check={path}: give another directory.")
    out = made_directory(Path(settings["out"]))
    console = open_console()
    found = _measure_all(cases, {**settings, "cold": False}, device, out, console)
    body, slower = [], []
    for (case, old), new in zip(before, found["rows"], strict=True):
        speed = new.get("tokens_per_s")
        ratio = speed / old if speed else 0.0
        if not ratio >= 1 - SLOWER:
            slower.append(f"{case.name} ({ratio:.2f} times the recorded speed)" if speed else f"{case.name} (failed)")
        reason = "" if speed else new.get("reason", "")[:60]
        now = f"{speed:,.0f}" if speed else ""
        body.append([case.name, f"{old:,.0f}", now, f"{ratio:.3f}" if speed else "", reason])
    console.print(rich_table(["row", "recorded tokens/s", "tokens/s now", "now / recorded", "why not"], body))
    if slower:
        raise CommandError(f"slower than recorded in {path} by more than {SLOWER:.0%}: {', '.join(slower)}.")
    console.print(f"no row is slower than recorded in {path} by more than {SLOWER:.0%}.")


def _recorded(file: Path) -> tuple[str, list[tuple[StepCase, float]]]:
    """The device of a results file, and of each of lkda's rows with a speed the case and the tokens/s.

    Raises: InputError if the file cannot be read, or holds a value of a wrong kind.
    """
    recorded = read_results_file(file, kind=report.KIND)
    with refusing_damage(file):
        device = {"device": recorded["header"]["device"]}
        check_values(device, {"device": str}, prefix=f"{file} is damaged: header.")
        rows = [row for row in recorded["rows"] if row["implementation"] in (TRAIN, BARE) and "tokens_per_s" in row]
        return device["device"], [_recorded_row(row, damaged=f"{file} is damaged: ") for row in rows]


def _recorded_row(row: Mapping[str, Any], *, damaged: str) -> tuple[StepCase, float]:
    given = {field.name: row[field.name] for field in fields(StepCase)}
    check_types(StepCase, given, prefix=damaged)
    check_values(row, {"tokens_per_s": float}, prefix=damaged)
    for name in ("B", "T", "steps", "vocab_size"):
        check_count(f"{damaged}{name}", given[name], least=1)
    if not row["tokens_per_s"] > 0:
        raise InputError(f"{damaged}tokens_per_s must be above 0, got {row['tokens_per_s']}.")
    return StepCase(**given), float(row["tokens_per_s"])


def cases_of(settings: Mapping[str, Any]) -> list[StepCase]:
    """The rows to measure: for each model and shape the peers, then the mixers, each followed by its bare loop.

    Peers and bare loops are measured on rows of one document only.

    Raises: InputError for an unknown name, a shape that is not BxT, or a number outside its range.
    """
    for option in ("models", "mixers", "shapes", "packed"):
        if not settings[option]:
            raise InputError(f"{option} is empty: give some, or leave it out.")
    check_names("step", "models", settings["models"], choices("model"))
    check_names("step", "mixers", settings["mixers"], choices("mixer"))
    check_names("step", "peers", settings["peers"], list(VARIANTS))
    check_count("vocab_size", settings["vocab_size"], least=2)
    check_count("steps", settings["steps"], least=BLOCK_STEPS)
    if settings["steps"] % BLOCK_STEPS:
        raise InputError(f"steps must be a multiple of {BLOCK_STEPS}, got {settings['steps']}.")
    if settings["compile"] not in ("auto", True, False):
        raise InputError(f"compile must be auto, true or false, got {settings['compile']!r}.")
    if any(packed not in (True, False) for packed in settings["packed"]):
        raise InputError(f"packed must be a list of true and false, got {list(settings['packed'])}.")
    check_overrides(settings["overrides"], _OPTIONS)
    shared = {name: settings[name] for name in ("vocab_size", "compile", "steps")}
    shared["overrides"] = list(settings["overrides"])
    cases = []
    for model in settings["models"]:
        for B, T in map(parse_shape, settings["shapes"]):
            for packed in settings["packed"]:
                for implementation, mixer in _implementations(settings, packed=packed):
                    cases.append(StepCase(implementation, model, mixer, B, T, packed, **shared))
    return cases


# Settings of scripts/train.py that have an option of task=step: another value would be measured under a wrong name.
_OPTIONS = {
    "model": "give models instead",
    "mixer": "give mixers instead",
    "model.vocab_size": "give vocab_size instead",
    "data": "give shapes and packed instead",
    "data.batch_size": "give shapes instead",
    "data.context": "give shapes instead",
    "data.packed": "give packed instead",
    "compile": "give compile instead",
    "trainer.accelerator": "give device instead",
    "trainer.max_steps": "give steps instead",
    "trainer.max_tokens": "give steps instead",
}


def check_overrides(overrides: Sequence[str], options: Mapping[str, str]) -> None:
    """Raise InputError for an override of a setting in `options`, whose value says what to do instead."""
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        if name in options:
            raise InputError(f"overrides must not set {name}, got {override}: {options[name]}.")


def _implementations(settings: Mapping[str, Any], *, packed: bool) -> Iterator[tuple[str, str]]:
    """(implementation, mixer) of the rows of one model and shape."""
    for peer in () if packed else settings["peers"]:
        for name in VARIANTS[peer]:
            yield name, "kda" if peer == "fla_kda" else "softmax"
    for mixer in settings["mixers"]:
        yield TRAIN, mixer
        if settings["bare"] and not packed:
            yield BARE, mixer


def parse_shape(text: str) -> tuple[int, int]:
    """ "8x2048" -> (8, 2048). Raises InputError for another form."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"with task=step a shape is B x T, rows x tokens of a row, as in 8x2048; got {text}.")
    B, T = map(int, text.split("x"))
    return B, T


def _check_trainable(cases: Sequence[StepCase], device: torch.device) -> None:
    """Raise InputError for settings with which a case cannot be trained, before the first row is measured."""
    checked = {(case.model, case.mixer, *case.overrides): case for case in cases}
    GlobalHydra.instance().clear()  # the configuration of scripts/benchmark.py is composed already
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for case in checked.values():
            plan = plan_run(compose("train", overrides=case.train_overrides(device)), Path("."))
            require_one_device(plan, what="task=step")


def choices(group: str) -> list[str]:
    """The choices of a group of configs/."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def check_names(task: str, option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise InputError for a name of `option` that is not known with this task."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option}: there is no {unknown[0]}; with task={task} there are {', '.join(known)}.")


def made_directory(out: Path) -> Path:
    """`out`, with a directory for logs. Raises InputError if it cannot be made."""
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write the directory {out}: {error.strerror}.") from error
    return out


def open_console() -> Console:
    """The terminal, or wide enough for the tables if the output is a file."""
    terminal = Console(markup=False, emoji=False, highlight=False)
    return terminal if terminal.is_terminal else Console(width=200, markup=False, emoji=False, highlight=False)


def header_of(device: torch.device) -> dict[str, Any]:
    """The device, the versions, the commit and the date."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "lkda": lkda.__version__,
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(_PACKAGES),
    }


def _measure_all(
    cases: Sequence[StepCase], settings: Mapping[str, Any], device: torch.device, out: Path, console: Console
) -> dict[str, Any]:
    """Measure the cases one after another. The JSON is complete after each row; tables and plots come at the end."""
    found: dict[str, Any] = {"kind": report.KIND, "header": header_of(device), "rows": []}

    def measure(case: StepCase) -> dict[str, Any]:
        return measure_case(case, device, cold=settings["cold"], limit=settings["time_limit"], out=out)

    measure_rows(cases, measure, found, out / RESULT, console, said=lambda row: f"{row['tokens_per_s']:,.0f} tokens/s")
    if any("tokens_per_s" in row for row in found["rows"]):
        report.redraw(out / RESULT)
    return found


def measure_case(case: StepCase, device: torch.device, *, cold: bool, limit: float, out: Path) -> dict[str, Any]:
    """The case with its measurements, or with the reason why there are none.

    Args:
        cold: whether a run of scripts/train.py's loop is measured with empty caches first, up to the first step; the
            row then has cold_first_step_s and imports_s, and its first_step_s is that of a run that finds these caches.
        limit: seconds after which a process is stopped.
    """
    request = {
        "implementation": case.implementation,
        "overrides": case.train_overrides(device),
        "warmup": WARMUP_STEPS,
        "timed": case.steps,
        "profiled": PROFILED_STEPS,
    }
    row = {"title": case.title, **asdict(case)}
    with tempfile.TemporaryDirectory() as folder:
        if cold and case.implementation == TRAIN:
            caches = {name: str(Path(folder, name.lower())) for name in _CACHES}
            first = run_child(ROW, request | {"timed": 0}, limit, out / "logs" / f"{case.name}_cold.txt", caches=caches)
            if "first_step_s" not in first:
                return row | first
            row["cold_first_step_s"] = first["first_step_s"]
            return row | run_child(ROW, request, limit, out / "logs" / f"{case.name}.txt", caches=caches)
    return row | run_fork(ROW, request, limit, out / "logs" / f"{case.name}.txt")
