"""Whether Weights & Biases is used online: if an account is logged in and its server accepts the run."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from lkda.io import write_atomically

T = TypeVar("T")
_FINISH_SECONDS = 120.0  # that the end of a run waits for the upload of its rows


def why_offline() -> str | None:
    """The reason why W&B cannot be used online now; None if it can."""
    import wandb

    if os.environ.get("WANDB_MODE") == "offline":
        return "WANDB_MODE=offline"
    address = urlsplit(wandb.setup().settings.base_url)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error})"
    if not wandb.login(prompt=False, verify=False):
        return "no account is logged in (`wandb login`, or WANDB_API_KEY)"
    return None


def begin_online_or_offline(begin: Callable[[dict[str, Any]], T]) -> tuple[T, str | None]:
    """What `begin(settings)` returns, which calls `wandb.init` with these settings: online if the server accepts the
    run, else offline. And the reason why W&B is used offline; None if it is online."""
    import wandb

    reason = why_offline()
    if reason is None:
        try:
            return begin(_settings(online=True)), None
        except wandb.Error as error:  # another server answers there, or none, or the key is wrong
            reason = f"the server does not accept the run ({' '.join(str(error).split())[:150]})"
            wandb.teardown()  # W&B's process would refuse to begin the same run again
    return begin(_settings(online=False)), reason


def _settings(*, online: bool) -> dict[str, Any]:
    import wandb

    return {
        "mode": "online" if online else "offline",
        "resume": "allow" if online else None,
        # The terminal is used by the progress bar, and its output need not be recorded. If the server is lost during
        # the run, its end would wait for it without a limit; `wandb sync` uploads the rest later.
        "settings": wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_SECONDS),
    }


def run_identity(directory: Path) -> str:
    """The id of the W&B run of a directory, which is stored in it, so that a later process continues the same run."""
    path = directory / "wandb_id.txt"
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
