"""The directories of the configurations and lm-eval tasks that come with lkda."""

from __future__ import annotations

from pathlib import Path

import lkda


def _folder(name: str) -> Path:
    """The directory is inside the package in an installed wheel, and beside the package in a checkout."""
    package = Path(lkda.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


CONFIGS = _folder("configs")
TASKS = _folder("tasks")
