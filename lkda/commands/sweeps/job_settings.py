"""Checks the settings of a job before any job begins, with the checks of the training and in their words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lkda.checks import InputError
from lkda.commands.command_line.errors import in_words
from lkda.commands.run.prepared_run import data_of
from lkda.commands.run.run_directory import RunFiles, recorded_config
from lkda.commands.run.run_setup import RunPlan, plan_run, settings_as_recorded
from lkda.commands.run.same_settings import check_same_settings
from lkda.commands.settings.config import check_keys


def check_job(config: DictConfig, directory: Path, *, resumes: bool, ended: bool) -> None:
    """Raise InputError for settings with which the job cannot be trained, or with which the run in its directory was
    not trained.

    What depends on the content of the data is found only by the training.

    Args:
        config: composed from configs/train.yaml, with the settings of Hydra.
        directory: the run directory, which need not exist.
        resumes: whether the training continues the run in the directory.
        ended: whether the training in the directory has ended. It is then not repeated on this machine.
    """
    recorded = recorded_config(directory)
    with _composed_for_training(config):
        check_keys(config, "train")
        config.resume = resumes
        plan = None if ended else _planned(config, directory)
        if recorded is None or not (ended or RunFiles(directory).holds_run()):
            return
        settings = plan.record if plan is not None and resumes else settings_as_recorded(config, recorded)
    check_same_settings(settings, recorded, directory, resumes=resumes, ended=ended)


def _planned(config: DictConfig, directory: Path) -> RunPlan:
    plan = plan_run(config, directory)
    data_of(plan)
    return plan


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Within it, an error that the user can correct becomes an InputError that begins with the name of the job."""
    try:
        yield
    except Exception as error:
        message = in_words(error)
        if message is None:
            raise
        raise InputError(f"{name}: {message}") from error


@contextmanager
def _composed_for_training(config: DictConfig) -> Iterator[None]:
    """Within it, `config` is the configuration of this process, as hydra.main would set it for scripts/train.py."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)
    with open_dict(config):
        del config["hydra"]
    try:
        yield
    finally:
        hydra.cfg = before
