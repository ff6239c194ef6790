"""Gives each job of a sweep that runs beside others (hydra/launcher=joblib) GPUs of its own."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lkda.checks import InputError, check_count

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_SECONDS_BETWEEN_TRIES = 1.0
# Open lock files of the GPUs of this process. They are locked until it ends, because CUDA keeps the GPUs that it found
# at its start.
_claimed: list[int] = []


# What a launcher or sweeper has as its default instead of the plugin's own: one job for each GPU instead of each core,
# and a search that goes on after a failed run.
_DEFAULTS = {
    "hydra/launcher=joblib": "hydra.launcher.n_jobs=${lkda_jobs_at_once:}",
    "hydra/sweeper=optuna": "hydra.sweeper.max_failure_rate=1.0",
}


def register() -> None:
    """Define `lkda_jobs_at_once`, which the overrides of `defaults_of_plugins` use."""

    def resolve(_root_: DictConfig) -> int:
        return jobs_at_once(_root_.jobs_per_gpu)

    OmegaConf.register_new_resolver("lkda_jobs_at_once", resolve, replace=True)


def defaults_of_plugins(arguments: Sequence[str]) -> list[str]:
    """The overrides to add to a command line that chooses a launcher or a sweeper without setting these options."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [
        override
        for choice, override in _DEFAULTS.items()
        if choice in arguments and override.partition("=")[0] not in given
    ]


def check_counts(arguments: Sequence[str]) -> None:
    """Raises InputError for a sweep without a run: Optuna would look for the best of none, or never end, and joblib has
    an error of its own."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        number = int(value) if re.fullmatch(r"[+-]?\d+", value) else None
        if key in ("hydra.sweeper.n_trials", "hydra.sweeper.n_jobs") and number is not None:
            check_count(key, number, least=1)
        if key == "hydra.launcher.n_jobs" and not number and "${" not in value:
            raise InputError(
                f"{key} must be the number of jobs at once, or -1 for as many as there are CPU cores, got {value}."
            )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as they are written in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get(_VARIABLE)
    if given is not None:
        return [word.strip() for word in given.split(",") if word.strip()]
    import torch  # takes seconds, and is needed only here

    return [str(number) for number in range(torch.cuda.device_count())]


def jobs_at_once(jobs_per_gpu: int) -> int:
    """The number of jobs that run at the same time: `jobs_per_gpu` for each GPU, and 1 without a GPU."""
    check_count("jobs_per_gpu", jobs_per_gpu, least=1)
    return max(1, jobs_per_gpu * len(visible_gpus()))


def claim_gpus(config: DictConfig) -> None:
    """In a job of a sweep with hydra/launcher=joblib, take free GPUs for this process, and make them the only ones that
    it sees. It waits until there are some. Call it before CUDA is used.

    Args:
        config: of the job.
    Raises: InputError if the sweep has more workers than the GPUs have places for.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN or "joblib" not in str(hydra.launcher.get("_target_")) or _claimed:
        return
    gpus = visible_gpus()
    if config.trainer.accelerator == "cpu" or not gpus:
        return
    places, needed = config.jobs_per_gpu, _gpus_of_a_job(config.trainer.get("devices", 1), gpus)
    check_count("jobs_per_gpu", places, least=1)
    workers = hydra.launcher.n_jobs if hydra.launcher.n_jobs > 0 else os.cpu_count() or 1
    most = places * (len(gpus) // needed)
    if workers > most:
        raise InputError(
            f"hydra.launcher.n_jobs={workers} jobs at once, each on {needed} GPU{'s' * (needed > 1)}, need more than "
            f"the {len(gpus)} GPUs here: give hydra.launcher.n_jobs={most}, or a larger jobs_per_gpu to share a GPU."
        )
    chosen = wait_for_gpus(gpus, needed=needed, places=places)
    os.environ[_VARIABLE] = ",".join(chosen)
    print(f"this process uses {_VARIABLE}={os.environ[_VARIABLE]}", flush=True)


def _gpus_of_a_job(devices: Any, gpus: list[str]) -> int:
    needed = len(gpus) if devices == "auto" else devices
    check_count("trainer.devices", needed, least=1)
    if needed > len(gpus):
        raise InputError(f"trainer.devices={needed}: there are {len(gpus)} GPUs; use at most that many.")
    return int(needed)


def wait_for_gpus(gpus: list[str], *, needed: int, places: int, folder: Path | None = None) -> list[str]:
    """Lock `needed` of the GPUs until this process ends, and return them.

    Args:
        places: the number of processes that may have one GPU at the same time.
        folder: of the lock files; None means one that all sweeps of this user on this machine share.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"lkda-gpus-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for place in range(places):
            locks = {gpu: lock for gpu in gpus if (lock := _locked(folder / f"{gpu}.{place}")) is not None}
            chosen = list(locks)[:needed] if len(locks) >= needed else []
            for gpu, lock in locks.items():
                if gpu in chosen:
                    _claimed.append(lock)
                else:
                    os.close(lock)
            if chosen:
                return chosen
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _locked(path: Path) -> int | None:
    """The open file, locked until this process closes it or ends; None if another process has it locked."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
