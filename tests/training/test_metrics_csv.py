"""The rows of a run, also where a kill cut them short."""

import csv
from pathlib import Path

import pytest

from lkda.checks import InputError
from lkda.training.metrics_csv import COLUMNS, MetricsCSV, check_rows

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


def written(path: Path, *rows: tuple[int, str]) -> Path:
    logger = MetricsCSV(path)
    for step, column in rows:
        logger.log_metrics({column: 1.0}, step=step)
    return path


# A run that logs every 10 steps and validates every 16, and has a checkpoint of step 34.
ROWS = (
    (1, "train/loss"),
    (10, "train/loss"),
    (16, "val/loss"),
    (20, "train/loss"),
    (30, "train/loss"),
    (32, "val/loss"),
)


def test_rows_up_to_a_checkpoint_are_complete(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.csv", *ROWS)
    assert check_rows(path, step=34, since_row=4, validation_interval=16)
    assert check_rows(path, step=34, since_row=None, validation_interval=16)
    assert check_rows(path, step=15, since_row=5, validation_interval=16)  # no validation is due before the first
    with open(path, "a") as file:
        file.write("36,")  # cut by a kill after the checkpoint
    assert check_rows(path, step=34, since_row=4, validation_interval=16)


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (2, "the row of step 30 and the validation at step 32 must be there, .* continues from step 34, .* of step 10"),
        (5, "damaged: the validation at step 32 must be there, .* is of step 30. Put it back, or move it away"),
    ],
)
def test_rows_that_were_removed_are_missed(kept: int, missing: str, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.csv", *ROWS[:kept])
    with pytest.raises(InputError, match=missing):
        check_rows(path, step=34, since_row=4, validation_interval=16)


def test_a_row_of_a_checkpoint_that_is_cut_is_missed(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.csv", *ROWS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="the validation at step 32 must be there"):
        check_rows(path, step=34, since_row=4, validation_interval=16)


def test_a_file_that_was_moved_away_begins_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    assert not check_rows(path, step=34, since_row=4, validation_interval=16)
    written(path, (40, "train/loss"))
    assert not check_rows(path, step=34, since_row=4, validation_interval=16)
    assert check_rows(path, step=42, since_row=2, validation_interval=16)  # the validation at 32 went with the old file
    assert check_rows(path, step=49, since_row=9, validation_interval=50)
    with pytest.raises(InputError, match="the validation at step 48"):
        check_rows(path, step=49, since_row=9, validation_interval=16)
