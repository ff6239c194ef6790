"""Error handling of every command: a user's mistake gives one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
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
from lkda.commands.command_line.choices import choices_with
from lkda.commands.command_line.examples import is_required
from lkda.commands.command_line.invocation import with_started_command
from lkda.commands.command_line.list_entries import list_entry_message
from lkda.io import file_in_the_way, write_atomically
from lkda.run_failure import FAILURE, OtherRunError

BAD_INPUT = 2
FAILED = 1
# Tells the processes that this one starts, which inherit HYDRA_FULL_ERROR, that it is not from the user.
_NOT_FROM_THE_USER = "LKDA_SETS_HYDRA_FULL_ERROR"
_HOME = Path(lkda.__file__).parent
# Packages that receive settings unchanged from the configuration. Their errors about a value are shown to the user.
_CONFIGURED = ("lightning", "lightning_utilities", "hydra", "omegaconf", "joblib")


def asks_for_tracebacks() -> bool:
    """Whether the user has set HYDRA_FULL_ERROR=1."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and _NOT_FROM_THE_USER not in os.environ


TRACEBACKS = asks_for_tracebacks()  # before this module sets the variable too


class CommandError(RuntimeError):
    """A command failed for a reason that is neither a bug nor bad input. Only its message is printed."""


@contextmanager
def readable_errors(*, of_job: bool = False) -> Iterator[None]:
    """Turn an error that the user can correct into one line `error: ...` and exit code 2. HYDRA_FULL_ERROR=1 keeps the
    traceback.

    It is used twice: around `main()`, where it also catches Hydra's errors about the command line, and around the
    command inside, where it prints before Hydra adds a line of its own.

    Args:
        of_job: whether it is the one inside. In a sweep that one raises the error again, because an exception fails
            only its job, and the other jobs continue.
    """
    # With this, Hydra raises its errors. Otherwise it prints them in its own format and exits with 1.
    if not TRACEBACKS:
        os.environ[_NOT_FROM_THE_USER] = "1"
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
        message = in_words(error)
        if TRACEBACKS or message is None:
            raise
        print(f"error: {with_started_command(message)}", file=sys.stderr)
        _leave_no_empty_directory()
        if of_job and _in_a_sweep():
            raise
        raise SystemExit(FAILED if isinstance(error, CommandError) else BAD_INPUT) from None


@contextmanager
def recorded_failure() -> Iterator[None]:
    """If a job of a sweep fails, write the reason into FAILURE in its directory, where compare.py finds it. If that is
    the directory of another run, nothing is written: the other run has not failed."""
    try:
        yield
    except Exception as error:
        if _in_a_sweep() and not isinstance(error, OtherRunError):
            directory = Path(HydraConfig.get().runtime.output_dir)
            directory.mkdir(parents=True, exist_ok=True)
            reason = in_words(error) or f"{type(error).__name__}: {_on_one_line(str(error))}"
            write_atomically(directory / FAILURE, reason + "\n")
        raise


def _leave_the_pipe() -> None:
    """Discard buffered output without a message, after the reader of a pipe has exited (`... | head`)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def output_that_may_end() -> Iterator[None]:
    """Once the reader of the output has exited (`... | head`), discard what is printed and continue the work.

    For a command that writes its result into files: hours of training must not end because a pipe was closed.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _MayEnd(before[0]), _MayEnd(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _MayEnd:
    """A text stream whose reader may exit. Everything except writing and flushing is passed to the stream."""

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
        """Send what is buffered, and everything written from now on, to the null device."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        print("the output is no longer read: training continues without printing", file=sys.stderr)


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _leave_no_empty_directory() -> None:
    """Remove the output directory if it is empty. Hydra creates it before a command begins."""
    runtime = HydraConfig.get().runtime if HydraConfig.initialized() else None
    if runtime is None or OmegaConf.is_missing(runtime, "output_dir"):
        return
    made = Path(runtime.output_dir)
    if made.absolute() != Path.cwd():
        with suppress(OSError):  # fails if the directory is not empty
            made.rmdir()


def in_words(error: Exception) -> str | None:
    """The one-line message for an error that the user can correct; None for a bug."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        known = in_words(error.__cause__)
        # For example a class that does not exist. An error raised inside a class of lkda's is a bug.
        within = any(path.is_relative_to(_HOME) for path in _files(error.__cause__))
        return known if known is not None or within else _configuration_message(error)
    if isinstance(error, InterpolationResolutionError) and (found := _input_error_of(error)) is not None:
        return in_words(found)
    if isinstance(error, MissingMandatoryValue):
        return is_required(str(error.full_key))
    if isinstance(error, (CommandError, InputError)):
        return _on_one_line(str(error))
    if _raised_by(error, ("hydra", "omegaconf")) and (message := list_entry_message(error)) is not None:
        return message
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _configuration_message(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if _out_of_memory(error):
        return (
            f"out of memory ({_on_one_line(str(error))[:200]}): lower data.batch_size (with "
            "trainer.accumulate_grad_batches in its place), data.context (of a synthetic task also data.val_lengths "
            "or the lengths in data.validation) or the size of the model."
        )
    if isinstance(error, ValueError) and _raised_by(error, ("optuna",)) and "No trials are completed" in str(error):
        return "no run of the search has finished, so there is no best one: the file failure.txt of each says why."
    if isinstance(error, RuntimeError) and _raised_by(error, ("submitit",)) and "slurm cluster" in str(error):
        return (
            "hydra/launcher=submitit_slurm needs Slurm, and this machine has no srun and sbatch: start the sweep on a "
            "machine of the cluster, or use hydra/launcher=submitit_local or hydra/launcher=joblib."
        )
    if isinstance(error, (ValueError, TypeError, *_misconfiguration())) and _raised_by(error, _CONFIGURED):
        return f"a setting cannot be used: {_on_one_line(str(error))}"
    return None


def _input_error_of(error: BaseException) -> InputError | None:
    """The InputError of a function of lkda's that computes a setting, as `${lkda_jobs_at_once:}` does, if that is the
    reason."""
    reason = error.__cause__ or error.__context__
    return reason if reason is None or isinstance(reason, InputError) else _input_error_of(reason)


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _of_the_system(error: OSError) -> str:
    """The message for an error of the operating system: a missing or protected file, a full disk, a network failure."""
    what = error.strerror or _on_one_line(str(error)) or type(error).__name__
    if error.filename is None:
        return f"{what}." if _inside_lkda(error) else f"cannot print: {what}."
    if _inside_lkda(error):
        return f"{error.filename}: {what}."
    return f"cannot create the output directory {error.filename}: {file_in_the_way(Path(error.filename)) or f'{what}.'}"


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or on the CPU. For the CPU torch has no error type of its own."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _misconfiguration() -> tuple[type[Exception], ...]:
    """Lightning's error type for a wrong setting, if Lightning is loaded."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if module is None else (module.MisconfigurationException,)


def _files(error: Exception) -> list[Path]:
    """The source files in the error's traceback. The file that raised it is the last."""
    return [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]


def _raised_by(error: Exception, packages: tuple[str, ...]) -> bool:
    """Whether a module of one of `packages` raised the error."""
    files = _files(error)
    return bool(files) and any(package in files[-1].parts for package in packages)


def _inside_lkda(error: Exception) -> bool:
    """Whether a command had begun. If not, Hydra failed to create the output directory."""
    begin = (Path(__file__), _HOME / "commands" / "entry_point.py")
    return any(path.is_relative_to(_HOME) and path not in begin for path in _files(error))


def _near(name: str, known: Sequence[str]) -> str | None:
    """The name in `known` that was probably meant: a similar one, or the initials of `name`, as lr of learning_rate."""
    initials = "".join(word[:1] for word in name.split("_"))
    close = difflib.get_close_matches(name, known, n=1)
    return close[0] if close else initials if "_" in name and initials in known else None


def _unknown_choice(group: str, name: str, choices: Sequence[str]) -> str:
    """The message for a choice that a group of the configuration does not have, as in mixer=kdaa."""
    near = _near(name, choices)
    hint = f"; did you mean {near}?" if near else "."
    there = f"there are {', '.join(choices)}" if choices else "there are none"
    what = {"data": "data set", "callbacks": "choice of callbacks", "debug": "kind of debug run"}
    return f"{group}={name}: there is no such {what.get(group, group.rpartition('/')[2])}; {there}{hint}"


def _configuration_message(error: Exception) -> str:
    """Hydra's message on one line. For an unknown key it adds the nearest existing key and the list of all keys."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return _unknown_choice(group, name, error.options)
    if isinstance(error, OverrideParseException):
        reason = re.split(r"\n?See https", error.message)[0].rpartition("\n")[2]
        return f"{error.override} cannot be read ({reason}): close all brackets and quotes, and quote a text with them."
    text = " ".join(re.split(r"\n\s*(?:full_key|Config search path)|, set env var HYDRA", str(error))[0].split())
    if isinstance(error, (InterpolationKeyError, InterpolationResolutionError)):
        return f"{error.full_key}: {text}. ${{...}} stands for another setting; in a text, write \\${{...}}."
    cause = error.__cause__
    if not isinstance(cause, (ConfigAttributeError, ConfigKeyError)) or not isinstance(cause.parent_node, DictConfig):
        return text
    known = [str(key) for key in cause.parent_node if key not in ("hydra", "_target_")]
    near = _near(str(cause.key), known)
    hint = f" Did you mean {near}?" if near else ""
    others = [] if near else choices_with(str(cause.full_key))
    which = "one of these" if len(others) > 1 else "that"
    elsewhere = f" It is a setting of {', '.join(others)}: choose {which}." if others else ""
    there = f" {'The chosen one' if others else 'It'} has {', '.join(known)}." if known else ""
    return f"{text.split(' To append')[0]}{hint}{elsewhere}{there}"
