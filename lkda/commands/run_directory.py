"""The run directory, the record of a run: who may write into it, and what is in it."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lkda.training.checkpoint import newest_intact, write_atomically

# Settings that change what a run computes: a run is resumed with the same ones.
_FIXED = ("model", "mixer", "data", "optimizer", "scheduler", "seed", "init_from")
_FIXED_TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "val_check_interval", "limit_val_batches")
# Where things lie and how many hands fetch them is free.
_FREE = ("cache_dir", "num_workers", "pin_memory")


class RunDirectory:
    """Paths of a run directory, and the lock of the process that trains in it.

    Args:
        path: of the directory; made where missing.
    Raises:
        ValueError: it cannot be written, or another process trains in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.summary = self.path / "summary.json"
        self.samples = self.path / "samples.txt"
        self.tokenizer = self.path / "tokenizer.json"
        self.checkpoints = self.path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass
        except OSError as error:
            raise ValueError(f"cannot write the run directory {self.path}: {error.strerror}.") from error
        self._lock = os.open(self.checkpoints, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is training in {self.path}. Wait for it, or choose another.") from error

    def release(self) -> None:
        """Let others train here. The lock also ends with the process."""
        os.close(self._lock)

    def begin(self, config: Mapping[str, Any], *, resume: bool) -> tuple[Path, dict[str, Any]] | None:
        """Take the directory for a run with `config`, a plain dict.

        Returns: the newest intact checkpoint of the run that is here, its path and content; None to start afresh.
        Raises:
            ValueError: a run is here and `resume` is false; or it has other settings; or none of its checkpoints can
                be read.
        """
        if not self.config.exists():
            return None
        if not resume:
            raise ValueError(
                f"{self.path} already holds a run. Continue it with resume=true, or choose another hydra.run.dir."
            )
        before = OmegaConf.to_container(OmegaConf.load(self.config))
        assert isinstance(before, dict)
        changed = list(_differences(_fixed(before), _fixed(config)))
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(changed[:4])}); it cannot resume."
            )
        for left_over in self.checkpoints.glob(".*.tmp"):
            left_over.unlink()
        return newest_intact(self.checkpoints)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Record the resolved configuration. From here on the directory holds a run."""
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(dict(config))))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Record the result."""
        write_atomically(self.summary, json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """The result that is recorded, {} where there is none."""
        return read_summary(self.summary)

    def rows(self) -> list[dict[str, str]]:
        """The rows of metrics.csv, in order, as text by column."""
        with open(self.metrics, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def columns(self) -> list[str]:
        """The names of the columns of metrics.csv."""
        with open(self.metrics, encoding="utf-8", newline="") as file:
            return next(csv.reader(file))

    def column(self, name: str) -> list[float]:
        """The values of a column of metrics.csv, in order, without the empty ones."""
        return [float(row[name]) for row in self.rows() if row[name]]


def read_summary(path: Path) -> dict[str, Any]:
    """What a run's summary.json holds, {} where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _fixed(config: Mapping[Any, Any]) -> dict[str, Any]:
    fixed = {key: config.get(key) for key in _FIXED}
    trainer = config.get("trainer") or {}
    return {**fixed, "trainer": {key: trainer.get(key) for key in _FIXED_TRAINER}}


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Every leaf in which two nested dicts differ, as `key: before, now`."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"{key}: {before} there, {now} here"]
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
        if name not in _FREE:
            found += _differences(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    return found
