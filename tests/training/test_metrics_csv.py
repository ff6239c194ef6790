"""The rows of a run, also where a kill cut them short."""

import csv
from pathlib import Path

import pytest

from lkda.training.metrics_csv import COLUMNS, MetricsCSV

HEADER = ",".join(COLUMNS) + "\n"


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"tokens": 64, "seconds": 0.5, "train/loss": 0.1 + 0.2}, step=1)
    # Floats are written so that reading gives the same number back.
    assert (tmp_path / "metrics.csv").read_text() == HEADER + "1,64,0.5,0.30000000000000004,,,,,,,,,,\n"


def test_a_resumed_run_keeps_what_it_builds_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step)}, step=step)
    with open(path, "a") as file:
        file.write("4,256,1.")  # cut by a kill
    again = MetricsCSV(path, resume_step=2)
    again.log_metrics({"train/loss": 3.5}, step=3)
    assert path.read_text() == HEADER + "1,,,1.0,,,,,,,,,,\n2,,,2.0,,,,,,,,,,\n3,,,3.5,,,,,,,,,,\n"


def test_rows_of_an_older_version_stand_under_todays_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,tokens,seconds,train/loss,val/loss,lr,gone\n4,256,1.5,2.0,,0.1,7\n4,256,1.5,,3.0,,\n")
    logger = MetricsCSV(path, resume_step=4)
    logger.log_metrics({"val/loss": 2.5}, step=5)
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["val/loss"] for row in rows] == ["", "3.0", "2.5"]
    assert (rows[0]["train/loss"], rows[0]["lr"], rows[0]["train/grad_norm"]) == ("2.0", "0.1", "")


def test_a_name_without_a_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column for train/accuracy"):
        MetricsCSV(tmp_path / "metrics.csv").log_metrics({"train/accuracy": 1.0}, step=1)
