"""How lkda was started, so that the commands it prints can be pasted into the same shell."""

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
    """A line for the shell that runs the command `name` by the door that this process came through.

    That is `lkda train`, `python -m lkda train`, or else `python scripts/train.py` where the scripts are at hand.

    Args:
        name: train, evaluate, generate, export, compare, benchmark or prepare-data.
        overrides: as `lkda.commands.overrides.override` makes them; they are quoted for the shell here.
    """
    return shlex.join([*_door(name), *overrides])


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
    """The overrides that made this run, to be given again; of a sweep's job, such that they run that job alone.

    Args:
        without: beginnings of those to leave out, as "mixer" or "resume=".
    """
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    given = [word for word in typed_overrides() if not word.lstrip("+~").startswith(without)]
    of_hydra = [word for word in typed_overrides(of_hydra=True) if word.startswith("hydra.searchpath=")]
    # An experiment may ask for a sweep by itself.
    would_sweep = hydra.mode == RunMode.MULTIRUN or hydra.sweeper.get("params")
    return [*given, *of_hydra, *(["hydra.mode=RUN"] if would_sweep else [])]


def by_this_door(text: str) -> str:
    """`text` that names scripts, with `lkda train` for `python scripts/train.py` where that is how lkda was started."""
    if _door("train")[-1] != "train":
        return text
    return re.sub(r"(?:python )?scripts/(\w+)\.py", lambda script: command(script[1].replace("_", "-")), text)


def _door(name: str) -> list[str]:
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
    """What to type for the interpreter that runs: its path where it is one of an environment that is not activated."""
    activated = "VIRTUAL_ENV" in os.environ or sys.prefix == sys.base_prefix
    return "python" if activated else short(Path(sys.executable))


def short(path: Path) -> str:
    """An absolute path, relative to the working directory where it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
