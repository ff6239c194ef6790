"""Measurements on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lkda.io import write_atomically


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; its directory is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
