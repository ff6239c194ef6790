"""The logger for Weights & Biases: online if its server can be reached and an account is logged in, else offline."""

from __future__ import annotations

import os
import shlex
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import WandbLogger

from lkda.io import write_atomically

_FINISH_SECONDS = 120.0  # that the end of a run waits for the upload of its rows


class StepWandbLogger(WandbLogger):
    """Lightning's logger, with the optimizer step as W&B's own step. It ends the W&B run when the training ends.

    Without a step, W&B counts rows from 0 in every process, so that a resumed run would overwrite its first rows. With
    the optimizer step, all parts of a run share one axis, and steps that are trained again after the last checkpoint
    replace the earlier ones. All rows of one step become one row in W&B, which is sent when the step is complete
    (`save`). Because the W&B run is ended, the next job of a sweep begins a new one.
    """

    _open_step: int | None = None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step, commit=False)
        self._open_step = step

    def save(self) -> None:
        if self._open_step is not None:
            self.experiment.log({}, step=self._open_step, commit=True)
            self._open_step = None

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


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


def wandb_logger(
    *,
    save_dir: str,
    config: dict[str, Any],
    project: str | None,
    name: str | None,
    group: str | None,
    tags: Sequence[str],
) -> WandbLogger:
    """A logger that sends the rows of metrics.csv, and once the resolved configuration, to W&B.

    A resumed run continues with the same id, which is stored in the run directory, and on the same axis.

    Args:
        save_dir: the run directory.
        config: the resolved configuration.
        project, name, group, tags: of the run in W&B; W&B chooses what is None. Runs that are compared share a group.
    """
    import wandb

    reason = why_offline()
    if reason is not None:
        files = f"{shlex.quote(save_dir)}/wandb/offline-run-*"
        print(f"wandb: offline, because {reason}; upload the run later with `wandb sync {files}`")
    identity = Path(save_dir) / "wandb_id.txt"
    if not identity.exists():
        write_atomically(identity, uuid.uuid4().hex[:8])
    return StepWandbLogger(
        save_dir=save_dir,
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        config=config,
        id=identity.read_text(encoding="utf-8").strip(),
        mode="online" if reason is None else "offline",
        resume="allow" if reason is None else None,
        # The terminal is used by the progress bar, and its output need not be recorded. If the server is lost during
        # the run, its end would wait for it without a limit; `wandb sync` uploads the rest later.
        settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_SECONDS),
    )
