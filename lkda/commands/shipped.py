"""The configurations and lm-eval tasks that come with lkda."""

from __future__ import annotations

from pathlib import Path

import lkda


def _folder(name: str) -> Path:
    """In an installed wheel it lies inside the package, in a checkout beside it."""
    package = Path(lkda.__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


CONFIGS = _folder("configs")
TASKS = _folder("tasks")
