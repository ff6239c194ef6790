"""How lkda was started. The commands that it prints begin in the same way and can be pasted into the same shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

import lkda

_SCRIPTS = Path(lkda.__file__).parents[1] / "scripts"


def command(name: str, *overrides: str) -> str:
    """A shell command that runs the command `name`, started in the same way as this process.

    This is `lkda train`, `python -m lkda train`, or `python scripts/train.py` if the scripts exist.

    Args:
        name: train, evaluate, generate, export, compare, benchmark or prepare-data.
        overrides: as made by `lkda.commands.command_line.overrides.override`. They are quoted for the shell here.
    """
    return shlex.join([*_launcher(name), *overrides])


def typed_overrides(*, of_hydra: bool = False) -> list[str]:
    """The overrides of the command line (of a sweep, its job's) as they were typed, interpolations not resolved.

    Args:
        of_hydra: those of Hydra's own settings, instead of the others.
    """
    if not HydraConfig.initialized():
        return []
    overrides = HydraConfig.get().overrides
    words = OmegaConf.to_container(overrides.hydra if of_hydra else overrides.task, resolve=False)
    assert isinstance(words, list)
    return words


def given_overrides(*, without: tuple[str, ...]) -> list[str]:
    """The overrides of this run, for a command that repeats it. For a job of a sweep they run only that job.

    Args:
        without: overrides that begin with one of these strings, such as "mixer" or "resume=", are left out.
    """
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    given = [word for word in typed_overrides() if not word.lstrip("+~").startswith(without)]
    of_hydra = [word for word in typed_overrides(of_hydra=True) if word.startswith("hydra.searchpath=")]
    # An experiment may itself start a sweep.
    would_sweep = hydra.mode == RunMode.MULTIRUN or hydra.sweeper.get("params")
    return [*given, *of_hydra, *(["hydra.mode=RUN"] if would_sweep else [])]


def has_new_directory() -> bool:
    """Whether the run directory is a new one at each start, because its name has the time. In a sweep, and without a
    command line, it is not: the directory of a job is decided elsewhere."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.RUN:
        return False
    named = OmegaConf.to_container(HydraConfig.get().run, resolve=False)
    assert isinstance(named, dict)
    return "${now:" in str(named["dir"])


def with_started_command(text: str) -> str:
    """`text` with every script replaced by the matching command, `python scripts/train.py` by `lkda train`, if this
    process was started by that command."""
    if _launcher("train")[-1] != "train":
        return text
    return re.sub(r"(?:python )?scripts/(\w+)\.py", lambda script: command(script[1].replace("_", "-")), text)


def _launcher(name: str) -> list[str]:
    started = Path(sys.argv[0])
    if started.stem == "lkda":
        on_path = shutil.which("lkda")
        same = on_path is not None and os.path.realpath(on_path) == os.path.realpath(started)
        return ["lkda" if same else short(started.absolute()), name]
    if started.name == "__main__.py" and started.parent.name == "lkda":
        return [python_command(), "-m", "lkda", name]
    script = _SCRIPTS / f"{name.replace('-', '_')}.py"
    return [python_command(), short(script)] if script.is_file() else ["lkda", name]


def python_command() -> str:
    """The shell word for this Python interpreter: its path if it belongs to an environment that is not activated."""
    activated = "VIRTUAL_ENV" in os.environ or sys.prefix == sys.base_prefix
    return "python" if activated else short(Path(sys.executable))


def short(path: Path) -> str:
    """`path`, an absolute path, made relative to the working directory if it is inside it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
