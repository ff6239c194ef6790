"""Over a long run, memory and the time of a step stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from lkda.commands.studies import long_run
from lkda.commands.studies.long_run import BLOCKS, main, measure
from lkda.report.redraw import main as redraw
from lkda.report.studies.long_run import quarters


@pytest.mark.long
def test_nothing_grows_in_20_000_steps() -> None:
    rows = measure(steps=20_000)
    assert rows[-1]["step"] == 20_000
    for column, most in (("resident_bytes", 1.01), ("objects", 1.001), ("steps_per_fixed", 1.1)):
        second, _, last = quarters(rows, column)
        assert last <= most * second, (column, second, last)


@pytest.mark.long
def test_a_short_one_is_measured() -> None:
    rows = measure("mixer=softmax", steps=8)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(row["cpu_seconds_per_step"] > 0 and row["objects"] > 10_000 for row in rows)
    assert all(0.1 < row["steps_per_fixed"] < 1000 for row in rows)
    assert 2**26 < rows[-1]["resident_bytes"] < 2**36


@pytest.mark.long
def test_a_run_of_some_minutes_is_measured_and_kept(tmp_path: Path) -> None:
    """It ends by itself. Each row is written before the next is measured, so that nothing is lost if it is stopped."""
    kept: list[int] = []
    small = ("debug=fast", "mixer=softmax", "trainer=cpu", "trainer.val_check_interval=1000")
    rows = measure(*small, minutes=0.02, keep=lambda rows: kept.append(len(rows)))
    assert kept == list(range(1, BLOCKS + 1))
    assert len(rows) == BLOCKS
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))


def test_no_command_is_printed_for_the_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(config: DictConfig, directory: Path) -> None:
        print(f"next: {directory}")
        meter = long_run._METERS[config.callbacks.growth.number]
        meter.rows.append(rows_of(0.0)[0])
        meter.keep()

    monkeypatch.setattr(long_run, "train", trained)
    main(["--steps", "4", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'long_run.json'} has 1 row, up to step 0.\n"


@pytest.mark.parametrize("words", [["--steps", "100", "--minutes", "1"], ["--minutes", "0"], ["--steps", "-1"]])
def test_a_wrong_length_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([*words, "--out", str(tmp_path / "out")])
    assert ending.value.code == 2
    assert capsys.readouterr().err.startswith("error: --")
    assert not (tmp_path / "out").exists()


def rows_of(growth: float) -> list[dict[str, Any]]:
    """100 rows, whose values grow by that factor over the run."""
    values = {"resident_bytes": 400 * 2**20, "objects": 200_000, "cpu_seconds_per_step": 0.004, "steps_per_fixed": 3.0}
    return [
        {"step": 10 * n, **{name: value * (1 + growth * n / 99) for name, value in values.items()}} for n in range(100)
    ]


def test_a_run_on_a_gpu_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"step": n, "seconds_per_step": 0.1, "device_bytes": 2**30, "resident_bytes": 2**30, "objects": 5}
        for n in range(8)
    ]
    header = {"device": "NVIDIA H200", "threads": 4, "torch": "2.11", "steps": 8, "minutes": 20.0}
    found = {"kind": "long_run", "header": header | {"settings": ["model=small"]}, "rows": rows}
    (tmp_path / "long_run.json").write_text(json.dumps(found))
    redraw([str(tmp_path)])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["median of"] for row in table["rows"]][:2] == [
        "memory reserved on the GPU in MiB",
        "time of a step in ms",
    ]
    assert table["note"].startswith("8 steps in 20 minutes with the settings model=small with validations and checkpoi")
    assert "NVIDIA H200, torch 2.11" in table["note"]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("growth", "shown"), [(0.0, "+0.0%"), (1.0, "+36.8%")])
def test_growth_is_shown(growth: float, shown: str, tmp_path: Path) -> None:
    header = {"device": "cpu", "steps": 1000, "threads": 1, "torch": "2.9"}
    (tmp_path / "long_run.json").write_text(json.dumps({"kind": "long_run", "header": header, "rows": rows_of(growth)}))
    redraw([str(tmp_path)])
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["growth"] for row in table["rows"]] == [shown] * 4
    assert (tmp_path / "long_run.png").read_bytes().startswith(b"\x89PNG")
