"""Measure training on several GPUs: speed, memory, the longest context, and whether the losses are those of one GPU.

    NCCL_NVLS_ENABLE=0 python -m lkda.commands.studies.scaling --gpus 1 2 4 --out docs/results/scaling_h200

Each row is a short run of scripts/train.py, in processes of its own. The parts:
    base        model=base with 8 x 2048 tokens on each GPU, with DDP and FSDP
    large       a KDA model of 1.3B parameters (24 layers of 2048, heads of 128) with FSDP, 8 x 2048 tokens on each GPU
    context     model=small with context parallelism: 64K tokens of one sequence on each GPU, and 256K with
                checkpointing=block
    agreement   200 steps on text at the same global batch on one GPU, with DDP, FSDP and context parallelism
    longest     the longest context of model=small with checkpointing=block, found from the memory of 256K tokens
Runs that measure a speed have their GPUs to themselves; runs on different GPUs are at the same time. A machine without
GPUs does not run the parts context and longest, which can fill its memory.

The results are written to OUT after each run: scaling.json, and from it table.json, agreement.json and scaling.png. The
same command measures what is missing, also with other numbers of GPUs or after a deadline. key=value is a setting of
scripts/train.py for all runs, and PART:key=value for those of one part. Leave NCCL_NVLS_ENABLE=0 out if the machine
allows NVLink multicast.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

import lkda
from lkda.bench.files import write_json
from lkda.checks import InputError, check_count
from lkda.commands.command_line.errors import FAILED, readable_errors
from lkda.commands.run.run_directory import RunFiles, read_summary
from lkda.commands.studies.scaling_cases import Case, Row, first_cases, last_cases, longest_cases, side_by_side
from lkda.commands.sweeps.sweep_gpus import visible_gpus
from lkda.metrics_file import read_metrics
from lkda.report.read.files import read_results_file
from lkda.report.studies.scaling import KIND, PARTS, redraw

# Seconds that a run needs at least; with less time left, none is begun.
_LEAST = 30.0


class Runs:
    """Runs cases and collects their rows.

    Args:
        folder: of the run directories. They are removed when the rows are read.
        out: where the log of a run that fails is kept.
        overrides: key=value for all runs, and PART:key=value.
        gpus: as in CUDA_VISIBLE_DEVICES; none on a CPU.
        limit: seconds of a run at most.
        deadline: seconds from now at which everything has ended; None: no deadline.
    """

    def __init__(
        self,
        folder: Path,
        out: Path,
        *,
        overrides: Sequence[str],
        gpus: Sequence[str],
        limit: float,
        deadline: float | None,
    ) -> None:
        self.folder, self.out, self.overrides, self.gpus, self.limit = folder, out, overrides, gpus, limit
        self._end = float("inf") if deadline is None else time.monotonic() + deadline

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def measure(self, cases: Sequence[Case]) -> list[Row]:
        """Run them at the same time. Returns their rows: what is measured, or {"reason"} why nothing was."""
        first, begun = 0, time.monotonic()
        started = []
        for case in cases:
            own = self.gpus[first : first + case.gpus]
            first += 0 if case.shares_gpus else case.gpus
            started.append((case, self._start(case, own)))
        until = begun + min(self.limit, self.left())
        return [self._row(case, process, until, begun) for case, process in started]

    def _start(self, case: Case, gpus: Sequence[str]) -> subprocess.Popen[bytes]:
        source = str(Path(lkda.__file__).parents[1])  # the child must import this package, not an installed one
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        words = [*case.overrides(), *_of_part(self.overrides, case.part), f"hydra.run.dir={self.folder / case.name}"]
        with open(self._log(case), "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lkda", "train", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the processes that it starts end with it
            )

    def _log(self, case: Case) -> Path:
        return self.out / f"{case.name}.log"

    def _row(self, case: Case, process: subprocess.Popen[bytes], until: float, begun: float) -> Row:
        row: Row = {"part": case.part, "how": case.how, "gpus": case.gpus, "tokens": case.tokens}
        log = self._log(case)
        try:
            process.wait(max(0.0, until - time.monotonic()))
            reason = _reason(log, process.returncode) if process.returncode else None
        except subprocess.TimeoutExpired:
            reason = f"it had not ended after {until - begun:.0f} seconds"
        finally:
            with suppress(ProcessLookupError):  # all of its session has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        row["row_seconds"] = round(time.monotonic() - begun, 1)
        if reason is not None:
            return row | {"reason": reason}
        log.unlink()
        directory = self.folder / case.name
        row |= measured(read_summary(directory / "summary.json"))
        if case.part == "agreement":
            rows = read_metrics(RunFiles(directory).metrics)
            row["losses"] = {int(found["step"]): float(found["train/loss"]) for found in rows if found["train/loss"]}
        for path in sorted((directory / "checkpoints").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        return row


def _of_part(overrides: Sequence[str], part: str) -> list[str]:
    """The overrides for the runs of that part, without its name."""
    return [word.removeprefix(f"{part}:") for word in overrides if _part(word) in (None, part)]


def _part(word: str) -> str | None:
    """The part that an override is for; None for all."""
    name, colon, _ = word.partition(":")
    return name if colon and name in PARTS else None


def measured(summary: Row) -> Row:
    """What a row has of summary.json. MFU belongs to the median speed, not to that of the last steps."""
    names = (
        *("tokens_per_s", "peak_memory_gib", "context", "model", "mixer", "params", "checkpointing", "precision"),
        *("checkpoints", "checkpoint_seconds", "val/loss", "steps", "device", "git_commit", "versions"),
    )
    row = {name: summary[name] for name in names}
    if summary["mfu"]:
        peak = 1e12 * summary["tflops_per_s"] / summary["mfu"]
        row["mfu"] = 3 * summary["flops_per_token"] * summary["tokens_per_s"] / peak
    return row


def _reason(log: Path, code: int) -> str:
    """Why a run failed. If several processes did, memory that ran out in one is the reason of the others.

    Args:
        code: with which its first process ended; of one that a signal has ended, the negative number of the signal.
    """
    lines = log.read_text(errors="replace").splitlines() or ["it printed nothing"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    memory = [line for line in errors if "out of memory" in line]
    # The launcher says so of another process, and then kills the first.
    killed = [int(found[1]) for line in lines if (found := re.search(r"terminated with code -(\d+)", line))]
    killed += [-code] if code < 0 else []
    if killed and not memory:
        name = signal.Signals(killed[0]).name
        return f"killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
    return (memory or errors or lines)[-1][:300]


def _is_final(row: Row) -> bool:
    """Whether a row is not measured again: it has a result, or says that a length is too long."""
    return "reason" not in row or (row["part"] == "longest" and "out of memory" in row["reason"])


def measure(
    runs: Runs, parts: Sequence[str], counts: Sequence[int], rows: list[Row], *, keep: Callable[[list[Row]], None]
) -> list[Case]:
    """Measure what `rows` does not have, and append it. Returns the cases for which there was no time. Cases that are
    refused on a machine without GPUs are passed over.

    Args:
        keep: is called with new rows after each group of runs.
    """

    def left_of(cases: Sequence[Case]) -> list[Case]:
        there = {_case(row) for row in rows} | refusals(cases, runs.overrides, gpus=runs.gpus).keys()
        waiting = [case for case in cases if case not in there]
        for group in side_by_side(list(waiting), len(runs.gpus) or max(counts)):
            if runs.left() < _LEAST:
                break
            new = runs.measure(group)
            rows.extend(new)
            keep(new)
            waiting = [case for case in waiting if case not in group]
        return waiting

    waiting = left_of(first_cases(parts, counts))
    while "longest" in parts and runs.gpus and not waiting:
        tried = longest_cases(rows, counts, memory_gib=_memory_gib())
        if not tried:
            break
        waiting = left_of(tried)
    return waiting + left_of(last_cases(parts, counts))


def refusals(cases: Sequence[Case], overrides: Sequence[str], *, gpus: Sequence[str]) -> dict[Case, str]:
    """The cases that this machine does not run, with the reasons.

    Args:
        overrides: key=value for all runs, and PART:key=value.
        gpus: as in CUDA_VISIBLE_DEVICES; none on a CPU.
    """
    if gpus:
        return {}
    found = {case: case.refusal_on_cpu(_of_part(overrides, case.part)) for case in cases}
    return {case: reason for case, reason in found.items() if reason is not None}


def _case(row: Row) -> Case:
    return Case(row["part"], row["how"], row["gpus"], row["tokens"])


def _memory_gib() -> float:
    import torch  # takes seconds, and is needed only here

    return float(torch.cuda.get_device_properties(0).total_memory / 2**30)


def run(options: argparse.Namespace, console: Console) -> bool:
    """Run the command. Returns whether every row has a result."""
    gpus = visible_gpus()
    counts = options.gpus or [n for n in (1, 2, 4, 8) if n <= max(1, len(gpus))]
    for count in counts:
        check_count("--gpus", count, least=1)
    if gpus and max(counts) > len(gpus) and not options.dry_run:
        raise InputError(f"--gpus {max(counts)}: there are {len(gpus)} GPUs.")
    wrong = [word for word in options.overrides if "=" not in word]
    if wrong:
        raise InputError(f"{wrong[0]} is not a setting: give key=value, or PART:key=value.")
    path = options.out / "scaling.json"
    rows: list[Row] = read_results_file(path, kind=KIND)["rows"] if path.exists() else []
    rows = [row for row in rows if _is_final(row)]
    cases = [*first_cases(options.parts, counts), *last_cases(options.parts, counts)]
    refused = refusals([case for case in cases if case not in map(_case, rows)], options.overrides, gpus=gpus)
    for case, reason in refused.items():
        console.print(f"{case.name}: refused, because {reason}.", soft_wrap=True)
    if options.dry_run:
        _print_plan([case for case in cases if case not in refused], rows, max(counts), console)
        return True
    options.out.mkdir(parents=True, exist_ok=True)

    def keep(new: Sequence[Row]) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(path, {"kind": KIND, "date": date, "rows": rows})
        if any("reason" not in row for row in rows):
            redraw(path)
        for row in new:
            said = row.get("reason") or f"{row['tokens_per_s']:,.0f} tokens/s"
            console.print(f"{_case(row).name}: {said} ({row['row_seconds']:.0f} s)", soft_wrap=True)

    with tempfile.TemporaryDirectory(dir=options.runs) as folder:
        runs = Runs(
            Path(folder),
            options.out,
            overrides=options.overrides,
            gpus=gpus,
            limit=options.limit,
            deadline=options.deadline,
        )
        waiting = measure(runs, options.parts, counts, rows, keep=keep)
    for case in waiting:
        console.print(f"{case.name}: no time", soft_wrap=True)
    return not waiting and not refused and all(_is_final(row) for row in rows)


def _print_plan(cases: Sequence[Case], rows: Sequence[Row], gpus: int, console: Console) -> None:
    """The runs of each group. Those of `longest` depend on what is measured before."""
    there = {_case(row) for row in rows}
    for group in side_by_side([case for case in cases if case not in there], gpus):
        console.print(f"at the same time: {', '.join(case.name for case in group)}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of scripts/train.py")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument(
        "--gpus", type=int, nargs="+", help="numbers of GPUs; default: those of 1, 2, 4, 8 that the machine has"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; default: all")
    parser.add_argument(
        "--limit", type=float, default=180, metavar="SECONDS", help="seconds that a run may take; default: 180"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="seconds until everything has stopped")
    parser.add_argument("--dry-run", action="store_true", help="print the runs only")
    parser.add_argument(
        "--runs",
        type=Path,
        help="directory of the runs while they train; default: the temporary directory of the system",
    )
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the runs on the way out
    with readable_errors():
        complete = run(options, Console(highlight=False, markup=False, emoji=False, width=150))
    raise SystemExit(0 if complete else FAILED)


if __name__ == "__main__":
    main()
