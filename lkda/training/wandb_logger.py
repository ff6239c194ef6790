"""The logger for Weights & Biases: online if its server accepts the run, else offline."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from lkda.training.wandb_connection import begin_online_or_offline, run_identity


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


def wandb_logger(
    *,
    save_dir: str,
    config: dict[str, Any],
    project: str | None,
    name: str | None,
    group: str | None,
    job_type: str | None,
    tags: Sequence[str] | None,
) -> WandbLogger:
    """A logger that sends the rows of metrics.csv, and once the resolved configuration, to W&B.

    A resumed run continues with the same id, which is stored in the run directory, and on the same axis.

    Args:
        save_dir: the run directory.
        config: the resolved configuration, with the names of mixer, model and data.
        project, name, job_type: of the run in W&B; W&B chooses what is None.
        group, tags: of the run in W&B; made of the names of mixer, model and data where None. W&B shows the runs of a
            group as one line, their mean, so a group has the runs that differ only in their seed.
    """
    if group is None or tags is None:
        names = [str(config["mixer"]["name"]), str(config["model"]["name"]), str(config["data"]["source"])]
        group, tags = "_".join(names) if group is None else group, names if tags is None else tags

    def begin(settings: Mapping[str, Any]) -> StepWandbLogger:
        made = StepWandbLogger(
            save_dir=save_dir,
            project=project,
            name=name,
            group=group,
            job_type=job_type,
            tags=list(tags),
            config=config,
            id=run_identity(Path(save_dir)),
            **settings,
        )
        if settings["mode"] == "online":
            _ = made.experiment  # asks the server
        return made

    logger, reason = begin_online_or_offline(begin)
    if reason is not None:
        files = f"{shlex.quote(save_dir)}/wandb/offline-run-*"
        print(f"wandb: offline, because {reason}; upload the run later with `wandb sync {files}`")
    return logger
