"""Train the jobs of experiments side by side on all GPUs, and stop before a deadline.

    python -m lkda.commands.sweeps.grid lm_by_mixer ablations --per-gpu 2 --deadline 560

Each argument is a file of configs/experiment/ or an override of scripts/train.py, key=value or ~key. An experiment's
sweep gives its jobs, which begin in its order: the values of its first setting change last. Each job is a process of
its own, whose run directory is OUT/EXPERIMENT/JOB; its output is grid.log there. The settings of all jobs are checked
before the first one begins.

The same command again skips the jobs that are done and continues those that were stopped. If a run directory holds a
run with other settings, the command ends with an error. A job that was cut off and has no checkpoint, for example on
another machine to which only the small files were copied, begins again. If its training had ended and only a
measurement is missing, it begins again only with --again, after all others. What it had written is kept in
OUT/EXPERIMENT/.JOB.before. A job that another such command runs in the same OUT is waited for.

An experiment may have keys for this command, which scripts/train.py ignores:
    sweeps      settings of scripts/train.py, several sweeps in place of one: each line is added to the experiment's
                sweep, and takes the place of its values for the same setting
    estimate    {start: seconds until the first step, then: seconds of the commands below,
                steps_per_s: {MIXER: steps per second of a job that has a GPU to itself, default: the same},
                gpu_share: the share of a GPU that a job keeps busy; 1 if left out. With small models it is less than 1,
                and several of them together take hardly longer than one}
    then        commands of lkda to run after the training, as "evaluate ckpt={run} out={run}/test.json". {run} is the
                run directory. A command whose `out` exists is not run again; one that trains, in its hydra.run.dir, is
                continued. What was measured or trained with other settings is an error.
                {only_with: mixer.kda, command: LINE} is run if the configuration of the job has that key. If a
                measurement fails, the commands after it are run all the same.
    values      of other settings of the experiment, as ${values.lr}; reports of the runs leave them out
A job is not begun if its estimate exceeds the time left, unless --cut is given; a later one that fits begins instead.
At the deadline the jobs that still run save a checkpoint and stop. When a job is done, its checkpoints and exported
weights are deleted, unless --keep-checkpoints is given. The table at the end has a row for each job.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

import lkda
from lkda.checks import InputError, check_count
from lkda.commands.command_line.errors import FAILED, TRACEBACKS, readable_errors
from lkda.commands.run.run_directory import RunFiles, read_summary
from lkda.commands.sweeps.grid_jobs import LOG, Job, jobs_of
from lkda.commands.sweeps.job_lock import JobLock
from lkda.commands.sweeps.sweep_gpus import jobs_at_once, visible_gpus
from lkda.io import file_in_the_way
from lkda.report.draw.tables import rich_table

# Seconds before the deadline at which running jobs are told to stop, to save their checkpoints.
GRACE = 20.0
_SECONDS_BETWEEN_LOOKS = 0.2
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def _end_with_parent() -> None:
    """Called in a new process: it is to be told to stop when this command ends, even by kill -9. It would keep the GPU
    otherwise, and no other process could continue the job."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class _Running:
    """A job in its process, on one GPU (None: the CPU)."""

    job: Job
    gpu: str | None
    commands: list[list[str]]
    lock: JobLock
    at_once: int = 1  # measurements
    printed_before: int = 0  # bytes of the log
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    measures: bool = False
    stopped: bool = False

    def goes_on(self) -> bool:
        """Begin the next command or measurements where the last have ended. Returns whether there is more to wait for.

        The commands after a training or an export need it, so they are not run if it failed. After a measurement that
        failed, the others are run: the weights may be gone later.
        """
        codes = [process.poll() for process in self.processes]
        if None in codes:
            return True
        if (any(codes) and not self.measures) or not self.commands:
            return False
        self.measures = _measures(self.commands[0])
        count = len(list(itertools.takewhile(_measures, self.commands[: self.at_once]))) or 1
        self.job.directory.mkdir(parents=True, exist_ok=True)
        self.processes = [self._process(self.commands.pop(0)) for _ in range(count)]
        return True

    def _process(self, command: list[str]) -> subprocess.Popen[bytes]:
        source = str(Path(lkda.__file__).parents[1])  # the child must import this package, not an installed one
        path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        if not TRACEBACKS:  # `readable_errors` has set it for this process
            environment.pop("HYDRA_FULL_ERROR", None)
        with open(self.job.directory / LOG, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "lkda", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                pass_fds=(self.lock.descriptor,),  # the job is this command's until its processes have ended
                process_group=0,  # Ctrl-C reaches this process alone, which then stops the jobs: once each
            )

    def stop(self) -> None:
        """Tell it to save a checkpoint and stop."""
        self.commands.clear()
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def reason(self) -> str:
        """Why it failed: the last error of its log, or its last line. Earlier processes have printed into it too."""
        killed = [-process.returncode for process in self.processes if process.returncode < 0]
        if killed:
            return f"killed by {signal.Signals(killed[0]).name}"
        with open(self.job.directory / LOG, "rb") as log:
            log.seek(self.printed_before)
            lines = log.read().decode(errors="replace").splitlines() or ["it printed nothing"]
        return ([line for line in lines if line.startswith("error:")] or lines)[-1].removeprefix("error: ")

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after so many seconds."""
        until = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _measures(command: Sequence[str]) -> bool:
    return command[0] == "evaluate"


def to_be_done(jobs: Sequence[Job], *, again: bool) -> list[Job]:
    """The jobs that are not done, in their order. Those that train a second time come last, or are left out."""
    open_jobs = [job for job in jobs if job.commands() and (again or not job.trains_a_second_time)]
    return sorted(open_jobs, key=lambda job: job.trains_a_second_time)


def run_jobs(
    jobs: Sequence[Job],
    *,
    gpus: Sequence[str],
    per_gpu: int,
    at_once: int,
    slowdown: float | None,
    deadline: float | None,
    cut: bool,
    again: bool,
    keep_checkpoints: bool,
    said: Callable[[str], None],
) -> set[str]:
    """Run what is to be done of the jobs, in the order of `to_be_done`. One that would not end in time is passed over.

    Args:
        gpus: as in CUDA_VISIBLE_DEVICES; if empty, `per_gpu` jobs share the CPU.
        per_gpu, slowdown: see `Job.seconds`.
        at_once: measurements of a job that run side by side.
        deadline: seconds from now; None means no deadline.
        cut: also begin jobs that will not end in time.
        again: also train jobs a second time whose weights are gone before all was measured.
        keep_checkpoints: whether the checkpoints of jobs that are done stay.
        said: is given a line for each job that begins or ends.
    Returns: the names of the jobs that failed.
    """
    end = None if deadline is None else time.monotonic() + deadline - GRACE
    places: list[str | None] = [gpu for _ in range(per_gpu) for gpu in gpus] or [None] * per_gpu
    estimates = {job.name: job.seconds(per_gpu=per_gpu, slowdown=slowdown) for job in jobs}
    waiting = to_be_done(jobs, again=again)
    for job in jobs:
        if job.commands() and job not in waiting:
            said(_left_out(job))
    running: list[_Running] = []
    elsewhere, failed = set[str](), set[str]()

    def left() -> float:
        return float("inf") if end is None else end - time.monotonic()

    try:
        while (waiting or running) and left() > 0:
            for one in [one for one in running if not one.goes_on()]:
                running.remove(one)
                places.append(one.gpu)
                failed |= _end(one, said, keep_checkpoints=keep_checkpoints)
            fitting = [job for job in waiting if cut or (estimates[job.name] or 0.0) <= left()]
            for job in fitting:
                lock = JobLock.take(job.directory) if places else None
                if lock is not None:
                    waiting.remove(job)
                    running += _begun(job, lock, places, at_once, estimates[job.name], said)
                elif places and job.name not in elsewhere:
                    elsewhere.add(job.name)
                    said(f"{job.name}: another process is running it, which is waited for")
            if not running and not fitting:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        for one in running:
            one.stop()
        until = time.monotonic() + GRACE
        for one in running:
            one.wait(until - time.monotonic())
            failed |= _end(one, said, keep_checkpoints=keep_checkpoints)
    for job in waiting:
        how_far = "not begun" if job.name in elsewhere else job.standing
        said(f"{job.name}: {how_far}, {_about(estimates[job.name])}")
    if waiting:
        said(f"a job has to end {GRACE:.0f} s before the deadline, which are kept for saving checkpoints")
    return failed


def _begun(
    job: Job,
    lock: JobLock,
    places: list[str | None],
    at_once: int,
    seconds: float | None,
    said: Callable[[str], None],
) -> list[_Running]:
    """The job, on the first of the places. None if another process has done it before its lock was free."""
    if not job.commands():
        lock.release()
        said(f"{job.name}: {job.status}")
        return []
    how = "begins"
    if job.begins_again:
        job.set_aside()
        how = "begins again, as it has no checkpoint to go on from"
    elif job.ended_before_a_step:
        how = "begins again, as it ended before its first step"
    said(f"{job.name}: {how}, {_about(seconds)}")
    log = job.directory / LOG
    printed = log.stat().st_size if log.exists() else 0
    return [_Running(job, places.pop(0), job.commands(), lock, at_once, printed)]


def _left_out(job: Job) -> str:
    made = ", ".join(job.missing())
    return f"{job.name}: trained, but {made} is missing, and its weights are gone; --again trains it again"


def _about(seconds: float | None) -> str:
    return "of unknown length" if seconds is None else f"about {seconds:.0f} s"


def _end(one: _Running, said: Callable[[str], None], *, keep_checkpoints: bool) -> set[str]:
    """Give the job's lock back, and say how it ended. Returns: its name if it failed."""
    job, log = one.job, one.job.directory / LOG
    failed = False
    if not job.commands():
        if not keep_checkpoints:
            job.delete_weights()
        said(f"{job.name}: {'diverged' if job.standing == 'diverged' else job.status}")
    elif one.stopped:
        when = " before its first step" if job.ended_before_a_step else ""
        how = "continues it" if job.has_checkpoint else "begins it again"
        said(f"{job.name}: stopped{when}; the same command {how}")
    else:
        failed = True
        said(f"{job.name}: failed ({log}): {one.reason()}")
    one.lock.release()
    return {job.name} if failed else set()


def table(jobs: Sequence[Job], failed: Collection[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each job. `failed` are the names of those that did."""
    head = ["job", "status", "steps", "validation", "test", "rate", "clipped", "tokens/s", "seconds"]
    body = []
    for job in jobs:
        found = read_summary(job.directory / "summary.json")
        validation = found.get("val/accuracy", found.get("val/bits_per_byte"))
        cells = [
            *(_number(found.get("steps"), "d"), _number(validation, ".4f")),
            *(_number(found.get("test/bits_per_byte"), ".4f"), _number(found.get("learning_rate"), "g")),
            *(_number(found.get("clipped_share"), ".1%"), _number(found.get("tokens_per_s"), ",.0f")),
            _number(found.get("seconds"), ".0f"),
        ]
        body.append([job.name, "failed" if job.name in failed else job.standing, *cells])
    return head, body


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def run(options: argparse.Namespace, console: Console) -> bool:
    """Run the command. Returns whether all jobs are done."""
    started = time.monotonic()
    check_count("--per-gpu", options.per_gpu, least=1)
    check_count("--measure-at-once", options.measure_at_once, least=1)
    _check_times(options)
    if (in_the_way := file_in_the_way(options.out)) is not None:
        raise InputError(f"--out={options.out}: {in_the_way}")
    overrides = [word for word in options.words if "=" in word or word.startswith("~")]
    jobs = jobs_of([word for word in options.words if word not in overrides], overrides, options.out)
    gpus = visible_gpus()
    _print_plan(jobs, options, places=jobs_at_once(options.per_gpu) if gpus else options.per_gpu, out=console)
    if options.dry_run:
        return True
    deadline = None if options.deadline is None else options.deadline - (time.monotonic() - started)
    failed = run_jobs(
        jobs,
        gpus=gpus,
        per_gpu=options.per_gpu,
        at_once=options.measure_at_once,
        slowdown=options.slowdown,
        deadline=deadline,
        cut=options.cut,
        again=options.again,
        keep_checkpoints=options.keep_checkpoints,
        said=lambda line: console.print(f"{time.monotonic() - started:5.0f} s  {line}", soft_wrap=True),
    )
    head, body = table(jobs, failed)
    console.print(rich_table(head, body, names=2))
    return not any(job.commands() for job in jobs)


def _check_times(options: argparse.Namespace) -> None:
    """Raise InputError for times with which no job could begin, or which are no times."""
    slowdown, deadline = options.slowdown, options.deadline
    if slowdown is not None and not 0 < slowdown < math.inf:
        raise InputError(f"--slowdown must be a number above 0, as 1.5 for half as long again, got {slowdown:g}.")
    if deadline is not None and not GRACE < deadline < math.inf:
        raise InputError(
            f"--deadline must be more than {GRACE:.0f} seconds, got {deadline:g}: the last {GRACE:.0f} s are kept for "
            "saving checkpoints. Leave it out for no deadline."
        )


def _print_plan(jobs: Sequence[Job], options: argparse.Namespace, *, places: int, out: Console) -> None:
    open_jobs = to_be_done(jobs, again=options.again)
    estimates = [job.seconds(per_gpu=options.per_gpu, slowdown=options.slowdown) for job in open_jobs]
    for job, seconds in zip(open_jobs, estimates, strict=True):
        out.print(f"{job.name}: {_about(seconds)}", soft_wrap=True)
    for job in jobs:
        if job.is_trained and not RunFiles(job.directory).config.exists():
            out.print(f"{job.name}: config.yaml is missing, so its settings are not known to be these", soft_wrap=True)
    known = [seconds for seconds in estimates if seconds is not None]
    unknown = len(open_jobs) - len(known)
    out.print(
        f"{len(open_jobs)} of {len(jobs)} jobs are to be done, {places} at a time: about {sum(known) / places:.0f} s"
        + (f", and {unknown} of unknown length" if unknown else ""),
        soft_wrap=True,
    )
    for job in jobs if options.dry_run else ():  # otherwise `run_jobs` names them
        if job.commands() and job not in open_jobs:
            out.print(_left_out(job), soft_wrap=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="EXPERIMENT", help="experiments, and settings key=value")
    parser.add_argument("--out", type=Path, default=Path("multirun"), help="directory of the run directories")
    parser.add_argument("--per-gpu", type=int, default=1, help="jobs that share a GPU (without a GPU: the CPU)")
    parser.add_argument(
        "--measure-at-once",
        type=int,
        default=1,
        metavar="N",
        help="measurements of a job (evaluate, after its training) that run side by side, if the memory is enough",
    )
    parser.add_argument(
        "--slowdown", type=float, help="how many times as long a job takes as on a GPU of its own; default: estimated"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="seconds after which everything has stopped")
    parser.add_argument("--cut", action="store_true", help="also begin jobs that will not end before the deadline")
    parser.add_argument(
        "--again", action="store_true", help="train a job again if its weights are gone before all was measured"
    )
    parser.add_argument(
        "--keep-checkpoints", action="store_true", help="keep the checkpoints and exports of finished jobs"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the jobs and their estimated times")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # stops the jobs on the way out
    with readable_errors():
        done = run(options, Console(highlight=False, markup=False, emoji=False, width=150))
    raise SystemExit(0 if done else FAILED)


if __name__ == "__main__":
    main(sys.argv[1:])
