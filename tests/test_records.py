"""Files of runs and models that were made to fill the memory or to be read without an end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lkda import metrics_file, records
from lkda.checks import InputError
from lkda.commands.run.run_directory import read_summary, recorded_config
from lkda.data.text.tokenizer import load_tokenizer
from lkda.formats import recorded_config as config_of_card
from lkda.formats.common.reading import read_config, read_tokenizer
from lkda.metrics_file import read_metrics
from lkda.report.read import runs
from lkda.report.read.files import read_results_file

# What reads each file of a directory.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "metrics": ("metrics.csv", lambda folder: read_metrics(folder / "metrics.csv")),
    "summary": ("summary.json", lambda folder: read_summary(folder / "summary.json")),
    "config": ("config.yaml", recorded_config),
    "run": ("config.yaml", lambda folder: runs._read_config(folder / "config.yaml")),
    "results": ("results.json", lambda folder: read_results_file(folder / "results.json")),
    "exported": ("config.json", read_config),
    "card": ("README.md", config_of_card),
    "tokenizer": ("tokenizer.json", read_tokenizer),
    "tokenizer of data": ("tokenizer.json", lambda folder: load_tokenizer(folder / "tokenizer.json")),
}
LAUGHS = "\n".join(["model: &a0 {x: 1}", *(f"k{n}: &a{n} [{', '.join(8 * [f'*a{n - 1}'])}]" for n in range(1, 30))])


@pytest.mark.parametrize("name", READERS)
def test_a_file_larger_than_any_is_not_read(name: str, tmp_path: Path) -> None:
    """It takes no room on the disk."""
    file, read = READERS[name]
    (tmp_path / file).touch()
    os.truncate(tmp_path / file, 2**40)
    with pytest.raises(InputError, match=rf"{file} has 1,099,511,627,776 bytes, but such a file has at most"):
        read(tmp_path)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("exported", "tokenizer of data")])
def test_a_device_without_an_end_is_not_read(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    (tmp_path / file).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=rf"{file} is not a file"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["config", "run", "card"])
def test_yaml_that_repeats_itself_is_not_expanded(name: str, tmp_path: Path) -> None:
    """A kilobyte stands for more values than any memory holds."""
    file, read = READERS[name]
    text = f"{LAUGHS}\nmixer: {{}}\ndata: {{}}\ntrainer: {{}}\n"
    (tmp_path / file).write_text(f"## Configuration\n\n```yaml\n{text}```\n" if name == "card" else text)
    with pytest.raises(InputError, match=rf"{file} refers to its own values \(\*name\)"):
        read(tmp_path)


def test_rows_for_more_values_than_memory_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has a value for each name in the first line, however short the row is."""
    names = ",".join(f"loss{n}" for n in range(99))
    (tmp_path / "metrics.csv").write_text(f"step,{names}\n" + "0\n" * 99)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 99
    monkeypatch.setattr(metrics_file, "MOST_VALUES", 9_999)
    with pytest.raises(InputError, match="100 rows, more values than the 9,999 that are read"):
        read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize("name", ["summary", "config", "run", "results", "exported"])
def test_values_within_values_without_an_end_are_refused(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    (tmp_path / file).write_text("[" * 100_000)
    with pytest.raises(InputError):
        read(tmp_path)


def test_what_is_small_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("é")
    assert records.read_record(tmp_path / "a", most=2) == "é"
    with pytest.raises(FileNotFoundError):
        records.read_record(tmp_path / "b")
