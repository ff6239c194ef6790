"""What W&B wrote offline, as its own reader prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def records(run: Path) -> list[list[dict[str, Any]]]:
    """The records of each process that ran in `run`, the first process first. A record names its `type`, and holds its
    content under that name."""
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    return [_inspected(file) for file in files]


def _inspected(file: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def history(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The logged rows, W&B's own columns (_step, _timestamp, ...) among them."""
    return [record["history"]["item"] for record in found if record["type"] == "history"]
