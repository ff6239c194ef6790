"""Weights & Biases, online where it can be, offline where it cannot."""

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


class StepWandbLogger(WandbLogger):
    """Lightning's logger, with the optimiser step as W&B's own step, and the run ended with the training.

    W&B counts rows where it is given no step, from 0 in every process: the rows of a resumed run would overwrite those
    of its beginning. Given the optimiser step, the parts of a run make one axis, and what is trained again after the
    last checkpoint lies on what was there. Rows of one step are one row there, sent when the step is complete (`save`).
    Ending the run leaves a sweep's next job to begin one of its own.
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
    """The reason why nothing can be sent now, or None."""
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
    """A logger that mirrors metrics.csv, with the resolved configuration beside it.

    A resumed run goes on under the same id, which is kept in the run directory, and on the same axis.

    Args:
        save_dir: the run directory.
        config: the resolved configuration.
        project, name, group, tags: how the run is filed, where None as W&B does; runs to be compared share a group.
    """
    import wandb

    reason = why_offline()
    if reason is not None:
        files = f"{shlex.quote(save_dir)}/wandb/offline-run-*"
        print(f"wandb: offline, because {reason}; send it later with `wandb sync {files}`")
    identity = Path(save_dir) / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
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
        # The terminal belongs to the progress bar, and is not worth recording.
        settings=wandb.Settings(silent=True, console="off"),
    )
