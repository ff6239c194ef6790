"""The outside of every command: a caller's mistake is one line and exit code 2, a bug keeps its traceback."""

from __future__ import annotations

import difflib
import dis
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, MissingMandatoryValue

import lkda
from lkda.commands.invocation import by_this_door

BAD_INPUT = 2
FAILED = 1
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # what the user asked for, before this module asks too
_HOME = Path(lkda.__file__).parent


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


def _in_a_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _message(error: Exception) -> str | None:
    """The one line for an error that the user can mend; None for a bug."""
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
        return _message(error.__cause__)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is required: give {error.full_key}=..."
    if isinstance(error, (HydraException, InterpolationResolutionError)):
        return _configuration_message(error)
    if isinstance(error, CommandError) or (isinstance(error, ValueError) and _raised_by_lkda(error)):
        return str(error)
    if isinstance(error, OSError) and not _inside_lkda(error):
        what = "print" if error.filename is None else f"create the output directory {error.filename}"
        return f"cannot {what}: {error.strerror}."
    return None


def _files(error: Exception) -> list[Path]:
    """The source files that the error passed through, the raising one last."""
    return [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _raised_by_lkda(error: Exception) -> bool:
    """Whether a `raise` statement of this package made the error, rather than a call inside it that failed."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not Path(last.tb_frame.f_code.co_filename).is_relative_to(_HOME):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _inside_lkda(error: Exception) -> bool:
    """Whether a command had begun: else Hydra failed to make the output directory."""
    begin = (Path(__file__), Path(__file__).with_name("entry_point.py"))
    return any(path.is_relative_to(_HOME) and path not in begin for path in _files(error))


def _configuration_message(error: Exception) -> str:
    """Hydra's own words on one line; for an unknown key, those that exist, the nearest one first."""
    text = " ".join(re.split(r"\n(?:full_key|Config search path)", str(error))[0].split())
    cause = error.__cause__
    if not isinstance(cause, (ConfigAttributeError, ConfigKeyError)) or not isinstance(cause.parent_node, DictConfig):
        return text
    known = [str(key) for key in cause.parent_node if key not in ("hydra", "_target_")]
    near = difflib.get_close_matches(str(cause.key), known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{text.split(' To append')[0]}{hint} It has {', '.join(known)}."
