"""metrics.csv, the record of a run's course, as a Lightning logger."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lkda.checks import InputError
from lkda.io import named, write_atomically
from lkda.metrics_file import read_metrics

COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train/loss",
    "train/bits_per_byte",
    "train/grad_norm",
    "train/clipped_share",
    "val/loss",
    "val/bits_per_byte",
    "tokens_per_s",
    "lr",
)


def steps_with(path: Path, column: str) -> set[int]:
    """The steps whose rows of a metrics.csv have a value in that column; none where there is no such file."""
    return {int(row["step"]) for row in read_metrics(path) if row.get(column)}


class MetricsCSV(Logger):
    """Appends a row at a time, each on disk when `log_metrics` returns.

    Args:
        path: of the file; a run that goes on appends to it.
        also: columns beside COLUMNS.
        resume_step: rows after this step are dropped first: the run resumes there and writes them again.
    """

    def __init__(self, path: str | Path, *, also: Sequence[str] = (), resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = (*COLUMNS, *also)
        # By name: a run that was begun by an older version has other columns.
        kept = [
            ",".join(row.get(name) or "" for name in self.columns)
            for row in read_metrics(self.path)
            if int(row["step"]) <= resume_step
        ]
        write_atomically(self.path, "\n".join([",".join(self.columns), *kept]) + "\n")

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row. Raises InputError for a name that is no column: it would be lost; OSError on a full disk."""
        unknown = metrics.keys() - set(self.columns)
        if unknown:
            raise InputError(f"metrics.csv has no column for {', '.join(sorted(unknown))}.")
        text = io.StringIO()
        row = {"step": step, **metrics}
        csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        with open(self.path, "ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(text.getvalue().encode()) < len(text.getvalue()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.path, whole)  # a part of a row would not be one
                raise named(error, self.path) from error

    def log_hyperparams(self, params: Any) -> None:
        """Nothing: config.yaml holds them."""
