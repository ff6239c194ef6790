"""The outside of every command: a caller's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

import lkda
from lkda.checks import InputError
from lkda.commands.invocation import by_this_door

BAD_INPUT = 2
FAILED = 1
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # what the user asked for, before this module asks too
_HOME = Path(lkda.__file__).parent
# What takes settings from the configuration as they are: what these packages say of a value is for the user.
_CONFIGURED = ("lightning", "lightning_utilities", "hydra", "omegaconf")


class CommandError(RuntimeError):
    """A command ended badly for a reason that is neither a bug nor bad input; its text is all there is to say."""


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what a user can mend into one line `error: ...` and exit code 2. HYDRA_FULL_ERROR=1 keeps the traceback.

    Use it around `main()`, where it also catches what Hydra finds wrong with the command line, and around the command
    inside, where it speaks before Hydra adds a line of its own.
    """
    # Hydra shall raise what it finds instead of printing it in its own way and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        _leave_the_pipe()
        raise SystemExit(FAILED) from None
    except Exception as error:
        message = _message(error)
        if TRACEBACKS or message is None:
            raise
        print(f"error: {by_this_door(message)}", file=sys.stderr)
        _leave_no_empty_directory()
        if _in_a_sweep():
            raise  # an exception fails this job alone; the sweep's other jobs go on
        raise SystemExit(FAILED if isinstance(error, CommandError) else BAD_INPUT) from None


def _leave_the_pipe() -> None:
    """After the reader of a pipe has left (`... | head`): what is still buffered goes nowhere, without a word."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def output_that_may_end() -> Iterator[None]:
    """What is printed goes nowhere from when its reader has left (`... | head`), and the work goes on.

    For a command whose result lies in files: hours of training must not end with a pipe.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _MayEnd(before[0]), _MayEnd(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _MayEnd:
    """A text stream whose reader may leave; all but writing and flushing is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._let_go()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        """What is written from now on, and what is still buffered, goes to the null device."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        print("nobody reads the output any more: training goes on without it", file=sys.stderr)


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _leave_no_empty_directory() -> None:
    """Hydra makes the output directory before a command begins."""
    runtime = HydraConfig.get().runtime if HydraConfig.initialized() else None
    if runtime is None or OmegaConf.is_missing(runtime, "output_dir"):
        return
    made = Path(runtime.output_dir)
    if made.absolute() != Path.cwd():
        with suppress(OSError):  # something is in it
            made.rmdir()


def _message(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for a bug."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        known = _message(error.__cause__)
        # A class that is not there, say; what is raised within one of lkda's is a bug.
        within = any(path.is_relative_to(_HOME) for path in _files(error.__cause__))
        return known if known is not None or within else _configuration_message(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is required: give {error.full_key}=..."
    if isinstance(error, (CommandError, InputError)):
        return _on_one_line(str(error))
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _configuration_message(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if _out_of_memory(error):
        return (
            f"out of memory ({_on_one_line(str(error))[:200]}): lower data.batch_size (with "
            "trainer.accumulate_grad_batches in its place), data.context or the size of the model."
        )
    if isinstance(error, (ValueError, TypeError, *_misconfiguration())) and _raised_by(error, _CONFIGURED):
        return f"a setting does not do: {_on_one_line(str(error))}"
    return None


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _of_the_system(error: OSError) -> str:
    """A file that is not there or may not be used, a full disk, a network that is down."""
    what = error.strerror or _on_one_line(str(error)) or type(error).__name__
    if error.filename is None:
        return f"{what}." if _inside_lkda(error) else f"cannot print: {what}."
    if _inside_lkda(error):
        return f"{error.filename}: {what}."
    return f"cannot create the output directory {error.filename}: {what}."


def _out_of_memory(error: Exception) -> bool:
    """On a GPU, or on the CPU, where torch has no type of error for it."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _misconfiguration() -> tuple[type[Exception], ...]:
    """Lightning's error for a setting, where Lightning is loaded."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if module is None else (module.MisconfigurationException,)


def _files(error: Exception) -> list[Path]:
    """The source files that the error passed through, the raising one last."""
    return [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _raised_by(error: Exception, packages: tuple[str, ...]) -> bool:
    """Whether a module of one of `packages` raised the error."""
    files = _files(error)
    return bool(files) and any(package in files[-1].parts for package in packages)


def _inside_lkda(error: Exception) -> bool:
    """Whether a command had begun: else Hydra failed to make the output directory."""
    begin = (Path(__file__), Path(__file__).with_name("entry_point.py"))
    return any(path.is_relative_to(_HOME) and path not in begin for path in _files(error))


def _configuration_message(error: Exception) -> str:
    """Hydra's own words on one line; for an unknown key, those that exist, the nearest one first."""
    text = " ".join(re.split(r"\n\s*(?:full_key|Config search path)|, set env var HYDRA", str(error))[0].split())
    if isinstance(error, (InterpolationKeyError, InterpolationResolutionError)):
        return f"{error.full_key}: {text}. ${{...}} stands for another setting; in a text, write \\${{...}}."
    cause = error.__cause__
    if not isinstance(cause, (ConfigAttributeError, ConfigKeyError)) or not isinstance(cause.parent_node, DictConfig):
        return text
    known = [str(key) for key in cause.parent_node if key not in ("hydra", "_target_")]
    near = difflib.get_close_matches(str(cause.key), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    there = f" It has {', '.join(known)}." if known else ""
    return f"{text.split(' To append')[0]}{hint}{there}"
