"""Writing measurements to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lkda.io import write_atomically


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON atomically. The directory is created where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1) + "\n")
