"""Reading results files. Each file names its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lkda.checks import InputError
from lkda.old_names import translated_results
from lkda.records import read_record


class OtherFileError(InputError):
    """A JSON file names no kind: it is of another program, or another file of lkda."""


def read_results_file(path: Path, *, kind: str | None = None) -> dict[str, Any]:
    """The content of a results file, whose entry "kind" says what it is, with the keys of today.

    Args:
        kind: the kind that the file must have; any kind where None.
    Raises: ValueError, naming the file, where it cannot be read, names no kind, has another kind, or lacks what a file
        of its kind holds. It is an OtherFileError where the file names no kind.
    """
    try:
        found = json.loads(read_record(path))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}).") from error
    named = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(named, str):
        raise OtherFileError(f'{path} does not say what it is: a results file has an entry "kind".')
    if kind is not None and named != kind:
        raise InputError(f"{path} is of the kind {named}, and {kind} is needed.")
    try:
        return translated_results(found)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not what its kind, {named}, says ({type(error).__name__}: {error}).") from error
