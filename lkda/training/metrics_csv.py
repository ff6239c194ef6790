"""A Lightning logger that writes metrics.csv, the rows that a run records while it trains."""

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
    "tflops_per_s",
    "mfu",
    "peak_memory_gib",
    "lr",
)


def steps_with(path: Path, column: str) -> set[int]:
    """The steps whose rows have a value in that column of a metrics.csv. The set is empty if there is no such file."""
    return {int(row["step"]) for row in read_metrics(path) if row.get(column)}


def check_rows(path: Path, *, step: int, since_row: int | None, validation_interval: int) -> bool:
    """Check that the rows that were written before a checkpoint are still there.

    A file that was moved away begins anew in the resumed run, so rows before its first one are not missed.

    Args:
        path: a metrics.csv.
        step: of the checkpoint.
        since_row: steps between the last row of training and the checkpoint; None if it is not known.
        validation_interval: optimizer steps between two validations. A step with a validation is saved after it.
    Returns: whether there is a row up to that step.
    Raises: InputError if some are there, and the last row of training or of a validation is not.
    """
    rows = read_metrics(path)
    first = min((int(row["step"]) for row in rows), default=step + 1)
    if first > step:
        return False
    logged = None if since_row is None else step - since_row
    validated = step - step % validation_interval
    missing = []
    if logged is not None and logged >= first and not _has(rows, logged, "train/loss"):
        missing.append(f"the row of step {logged}")
    if validated >= first and not _has(rows, validated, "val/loss"):
        missing.append(f"the validation at step {validated}")
    if missing:
        last = max(int(row["step"]) for row in rows if int(row["step"]) <= step)
        raise InputError(
            f"{path} is damaged: {' and '.join(missing)} must be there, because the run continues from step {step}, "
            f"but its last row up to there is of step {last}. Put it back, or move it away to continue without its "
            "rows."
        )
    return True


def _has(rows: Sequence[Mapping[str, str]], step: int, column: str) -> bool:
    return any(int(row["step"]) == step and row.get(column) for row in rows)


class MetricsCSV(Logger):
    """Appends one row at a time. The row is on disk when `log_metrics` returns.

    Args:
        path: the file. A resumed run appends to it.
        also: columns in addition to COLUMNS.
        resume_step: rows after this step are removed first, because the resumed run writes them again.
    """

    def __init__(self, path: str | Path, *, also: Sequence[str] = (), resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns = (*COLUMNS, *also)
        # Columns are matched by name, because a run that an older version began has other columns.
        earlier_rows = [
            ",".join(row.get(name) or "" for name in self.columns)
            for row in read_metrics(self.path)
            if int(row["step"]) <= resume_step
        ]
        write_atomically(self.path, "\n".join([",".join(self.columns), *earlier_rows]) + "\n")

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row. Raises InputError for a name that is not a column, and OSError if the disk is full."""
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
                os.truncate(self.path, whole)  # remove the incomplete row
                raise named(error, self.path) from error

    def log_hyperparams(self, params: Any) -> None:
        """Does nothing: config.yaml holds the hyperparameters."""
