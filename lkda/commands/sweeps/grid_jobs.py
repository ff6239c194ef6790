"""The jobs of an experiment's sweep: what each has done, what is left of it, and how long that takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError, check_values
from lkda.commands.command_line.overrides import as_typed
from lkda.commands.run.run_directory import RunFiles, read_summary
from lkda.commands.run.same_settings import check_same_measurement
from lkda.commands.settings.config import resolve
from lkda.commands.sweeps.job_settings import check_job, errors_of
from lkda.data.progress import patient_progress
from lkda.metrics_file import read_metrics
from lkda.shipped import CONFIGS

# The output of a job, in its run directory.
LOG = "grid.log"
_ESTIMATE = {"start": float, "then": float, "steps_per_s": Mapping[str, float], "gpu_share": float}
_ENDED = ("finished", "diverged")  # the status of a training that is not continued
_CONDITIONAL = {"only_with": str, "command": str}  # an entry of `then`
# Settings of scripts/train.py that this command sets itself, with what to do instead.
_OF_GRID = {
    "experiment": "give the name of the experiment alone",
    "hydra.run.dir": "a job has a run directory in --out",
    "hydra.mode": "each job is a run of its own; leave it out",
    "resume": "the same command continues the jobs that were stopped; leave it out",
}
# A job writes into a log, where a bar would be redrawn line by line.
_QUIET = ("callbacks.overview=null", "callbacks.progress=null")


@dataclass(frozen=True)
class Job:
    """A job of an experiment.

    Attributes:
        name: EXPERIMENT/JOB, the run directory below --out.
        overrides: of scripts/train.py.
        directory: the run directory.
        steps: optimizer steps of the whole run; None where the length is given in tokens.
        start, then_seconds: seconds until the first step, and of the commands after the training.
        steps_per_s: the speed of a job that has a GPU to itself; None if it is not known.
        gpu_share: the share of a GPU that a job keeps busy.
        then: the arguments of each command after the training.
    """

    name: str
    overrides: tuple[str, ...]
    directory: Path
    steps: int | None
    start: float
    then_seconds: float
    steps_per_s: float | None
    then: tuple[tuple[str, ...], ...]
    gpu_share: float = 1.0

    @property
    def status(self) -> str:
        """new, or the status in summary.json: finished, interrupted or diverged."""
        return str(read_summary(self.directory / "summary.json").get("status", "new"))

    @property
    def standing(self) -> str:
        """How far the job is, in words for a table."""
        if not self.commands():
            return "done" if len(self._all()) == 1 + len(self.then) else "diverged"
        if self.status == "finished":
            return "trained, not all measured"
        if self.has_begun:
            return "cut off"
        return "ended before its first step" if self.ended_before_a_step else "not begun"

    @property
    def has_begun(self) -> bool:
        """Whether its training has a summary, or has done a step."""
        run = RunFiles(self.directory)
        return run.summary.exists() or run.holds_run()

    @property
    def ended_before_a_step(self) -> bool:
        """Whether the job has printed something, but its training has not done a step."""
        return (self.directory / LOG).exists() and not self.has_begun

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(RunFiles(self.directory).checkpoints.glob("*.ckpt*"))

    @property
    def is_trained(self) -> bool:
        """Whether its training has ended, well or not."""
        return self.status in _ENDED

    @property
    def begins_again(self) -> bool:
        """Whether the job has begun, is not done, and has no checkpoint to go on from."""
        return self.has_begun and bool(self._open()) and not self.has_checkpoint

    @property
    def trains_a_second_time(self) -> bool:
        """Whether its training has ended, but has to be repeated for a measurement."""
        return self.status == "finished" and self.begins_again

    def commands(self) -> list[list[str]]:
        """The arguments of lkda for what is still to be done. A training that diverged is not repeated."""
        return [_continuing(words) for words in (self._all() if self.begins_again else self._open())]

    def _all(self) -> list[tuple[str, ...]]:
        """All commands, or those before a training that diverged: there is nothing to measure after it."""
        found = [_training(self.overrides, self.directory), *self.then]
        ends = [n for n, words in enumerate(found) if words[0] == "train" and _training_status(words) == "diverged"]
        return found[: min(ends, default=len(found))]

    def _open(self) -> list[tuple[str, ...]]:
        """What has no result yet. A missing export is none if all that comes after it is done."""
        found: list[tuple[str, ...]] = []
        for words in reversed(self._all()):
            needed = words[0] != "export" or found or words is self.then[-1]
            if needed and not _is_done(words):
                found.insert(0, words)
        return found

    def missing(self) -> list[str]:
        """What its commands are still to make after its training, as paths in the run directory."""
        return [os.path.relpath(_result(words), self.directory) for words in self._open() if words in self.then]

    def set_aside(self) -> None:
        """Rename the run directory to .JOB.before. An earlier directory of this name is deleted."""
        before = self.directory.with_name(f".{self.directory.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        self.directory.rename(before)

    def delete_weights(self) -> None:
        """Delete the checkpoints, and what was exported. The directory of an export stays, and is empty."""
        shutil.rmtree(RunFiles(self.directory).checkpoints, ignore_errors=True)
        for words in self.then:
            path = _result(words)
            if words[0] == "train":
                shutil.rmtree(RunFiles(path).checkpoints, ignore_errors=True)
            elif words[0] == "export":
                shutil.rmtree(path)
                path.mkdir()

    def seconds(self, *, per_gpu: int = 1, slowdown: float | None = None) -> float | None:
        """The estimated time of what is still to be done; None if it cannot be estimated.

        Args:
            per_gpu: jobs that share a GPU.
            slowdown: how much longer the training and the commands after it take for that reason. None means that the
                jobs need `per_gpu` times `gpu_share` of a GPU.
        """
        slowdown = max(1.0, per_gpu * self.gpu_share) if slowdown is None else slowdown
        train = self.begins_again or not self.is_trained
        after = slowdown * self.then_seconds * (len(self.commands()) - train) / max(1, len(self.then))
        if not train:
            return after
        if self.steps is None or self.steps_per_s is None:
            return None
        rows = [] if self.begins_again else read_metrics(RunFiles(self.directory).metrics)
        done = int(rows[-1]["step"]) if rows else 0
        return self.start + slowdown * max(0, self.steps - done) / self.steps_per_s + after


def _training(overrides: Sequence[str], directory: Path) -> tuple[str, ...]:
    return "train", *overrides, f"hydra.run.dir={directory}"


def _result(words: Sequence[str]) -> Path:
    """What a command makes: its run directory, or its `out`. Raises: InputError where it names none."""
    option = "hydra.run.dir=" if words[0] == "train" else "out="
    named = [word.removeprefix(option) for word in words if word.startswith(option)]
    if not named:
        raise InputError(f"a command of `then` needs {option}..., which says whether it is done: {' '.join(words)}")
    return Path(named[-1])


def _is_done(words: Sequence[str]) -> bool:
    path = _result(words)
    return path.exists() if words[0] != "train" else _training_status(words) == "finished"


def _training_status(words: Sequence[str]) -> str | None:
    return read_summary(_result(words) / "summary.json").get("status")


def _continuing(words: Sequence[str]) -> list[str]:
    return [*words, *_QUIET, "hydra.mode=RUN", "resume=true"] if words[0] == "train" else [*words]


def jobs_of(experiments: Sequence[str], overrides: Sequence[str], out: Path) -> list[Job]:
    """The jobs of the experiments, in the order of their sweeps.

    Args:
        overrides: of scripts/train.py; a sweep in them takes the place of the experiment's over the same setting.
    Raises: InputError for an unknown experiment, or settings that cannot be composed.
    """
    there = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
    unknown = [name for name in experiments if name not in there]
    if unknown or not experiments:
        raise InputError(f"give names of experiments: {', '.join(there)}; got {', '.join(unknown) or 'none'}.")
    for word in overrides:
        if (instead := _OF_GRID.get(word.lstrip("+~").partition("=")[0])) is not None:
            raise InputError(f"{word} cannot be used here: {instead}.")
    jobs: list[Job] = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"), patient_progress() as bar:
        found = [(name, one) for name in experiments for one in _combinations(name, as_typed(overrides))]
        task = bar.add_task("checking the settings of the jobs", total=len(found))
        for name, (swept, fixed) in found:
            jobs.append(_job(name, swept, fixed, out))
            bar.advance(task)
    names = [job.name for job in jobs]
    double = [name for name in names if names.count(name) > 1]
    if double:
        raise InputError(f"two jobs would have the run directory {double[0]}: give each experiment and value once.")
    return jobs


def _combinations(experiment: str, overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """For each job, the values of the swept settings and those of the settings that all jobs share."""
    config = compose("train", [f"experiment={experiment}"], return_hydra_config=True)
    params = config.hydra.sweeper.get("params") or {}
    own = [f"{key}={value}" for key, value in params.items()]
    lines = _plain(config, "sweeps", [""])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError(f"sweeps of {experiment} must be a list of lines such as 'seed=1,2 mixer=kda'; got {lines}.")
    parser = OverridesParser.create()
    with errors_of(experiment):
        given = parser.parse_overrides([*overrides])
    found = []
    for line in lines:
        try:
            listed = parser.parse_overrides([*own, *shlex.split(line)])
            combined = BasicSweeper.split_arguments([*listed, *given], max_batch_size=None)[0]
        except (HydraException, ValueError) as error:
            raise InputError(f"the sweep of {experiment} cannot be read: {' '.join(str(error).split())}") from error
        swept = {one.get_key_element() for one in (*listed, *(one for one in given if one.is_sweep_override()))}
        # The sweeper writes a deletion ~KEY as ~KEY=null, which deletes only a value of null.
        deletions = {one.get_key_element(): str(one.input_line) for one in (*listed, *given) if one.is_delete()}
        written = [[deletions.get(word.partition("=")[0], word) for word in words] for words in combined]
        found += [_parted(words, swept) for words in written]
    return found


def _parted(words: Sequence[str], swept: Collection[str]) -> tuple[list[str], list[str]]:
    """The overrides of the swept settings, and the others."""

    def is_swept(word: str) -> bool:
        return word.partition("=")[0] in swept

    return [word for word in words if is_swept(word)], [word for word in words if not is_swept(word)]


def _job(experiment: str, swept: Sequence[str], fixed: Sequence[str], out: Path) -> Job:
    overrides = (f"experiment={experiment}", *swept, *fixed)
    name = f"{experiment}/{_directory_name(swept)}"
    directory = out.absolute() / name
    words = as_typed(_continuing(_training(overrides, directory))[1:])
    with errors_of(experiment):
        config = compose("train", words, return_hydra_config=True)
    devices = OmegaConf.select(config, "trainer.devices", default=1)
    if devices != 1:
        raise InputError(f"trainer.devices={devices}: a job has one GPU; run {experiment} by train.py.")
    job = Job(name, overrides, directory, None, 0, 0, None, _commands_after(config, directory))
    with errors_of(name):
        resumes = not (job.is_trained or job.begins_again)
        check_job(config, directory, resumes=resumes, ended=job.is_trained)
        _check_results(job.then)
        return replace(job, **_estimated(config))


def _estimated(config: DictConfig) -> dict[str, Any]:
    """The fields of a job that its estimate needs."""
    estimate = _plain(config, "estimate", {})
    if not isinstance(estimate, dict):
        raise InputError(f"estimate must have keys of {', '.join(_ESTIMATE)}, got {estimate!r}.")
    check_values(estimate, _ESTIMATE, prefix="estimate.")
    speeds = estimate.get("steps_per_s", {})
    speed = speeds.get(config.mixer.name, speeds.get("default"))
    found = {
        "start": estimate.get("start", 0),
        "then_seconds": estimate.get("then", 0),
        "steps_per_s": speed,
        "gpu_share": estimate.get("gpu_share", 1.0),
    }
    if min(found["start"], found["then_seconds"], found["gpu_share"]) < 0 or (speed is not None and speed <= 0):
        raise InputError(f"estimate must have times of 0 or more, and steps_per_s above 0, got {estimate}.")
    return {**found, "steps": config.trainer.max_steps if config.trainer.max_tokens is None else None}


def _commands_after(config: DictConfig, directory: Path) -> tuple[tuple[str, ...], ...]:
    """The arguments of the commands of `then`."""
    then = []
    for line in _lines_after(config):
        try:
            words = tuple(word.replace("{run}", str(directory)) for word in shlex.split(line))
        except ValueError as error:
            raise InputError(f"a command of `then` cannot be read ({error}): {line}") from error
        _result(words)  # raises where a command names none
        then.append(words)
    return tuple(then)


def _check_results(then: Sequence[Sequence[str]]) -> None:
    """Raise InputError if a training or a measurement of `then` has been made with other settings than are asked for
    now. What an export has written is deleted when the job is done, so it is not compared."""
    for words in then:
        path = _result(words)
        if words[0] == "train" and _training_status(words) in _ENDED:
            config = compose("train", as_typed(_continuing(words)[1:]), return_hydra_config=True)
            check_job(config, path, resumes=False, ended=True)
        elif words[0] == "evaluate" and path.exists():
            check_same_measurement(resolve(compose("evaluate", as_typed(words[1:]))), path)


def _lines_after(config: DictConfig) -> list[str]:
    """The lines of `then` that are for this job."""
    lines = []
    for entry in _plain(config, "then", []):
        if isinstance(entry, dict):
            if entry.keys() != _CONDITIONAL.keys():
                raise InputError(f"an entry of `then` is a line, or has the keys only_with and command; got {entry}.")
            check_values(entry, _CONDITIONAL, prefix="then.")
            if OmegaConf.select(config, entry["only_with"]) is None:
                continue
            entry = entry["command"]
        lines.append(str(entry))
    return lines


def _plain(config: DictConfig, key: str, otherwise: Any) -> Any:
    found = config.get(key)
    if found is None:
        return otherwise
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def _directory_name(swept: Sequence[str]) -> str:
    """As mixer=kda_seed=1; a dictionary {kda:{gate:head}} becomes kda.gate=head. It has no comma, as Hydra would take a
    path with one for a sweep."""
    return "_".join(_word(override) for override in swept) or "run"


def _word(override: str) -> str:
    key, _, value = override.partition("=")
    if key.startswith("~"):
        return f"no_{key[1:].rpartition('.')[2]}"
    if value.startswith("{"):
        value = value.strip("{}").replace(":{", ".").replace("}", "").replace(":", "=")
    return re.sub(r"[^\w.=+-]+", "_", f"{key.rpartition('.')[2]}={value}").strip("_")
