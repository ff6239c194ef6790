"""`-m`: a run for each combination, in a directory of its own."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.commands.small import ROOT, small_run


def sweep(corpus: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    arguments = ["-m", *small_run(corpus, "sample.max_new_tokens=0", *overrides), f"hydra.sweep.dir={directory}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def results(directory: Path) -> dict[str, dict[str, object]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(directory.glob("*/summary.json"))}


@pytest.mark.long
def test_mixers_and_seeds(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(corpus, tmp_path, monkeypatch, "mixer=kda,softmax", "seed=1,2")
    found = results(tmp_path)
    jobs = [("kda", 1), ("kda", 2), ("softmax", 1), ("softmax", 2)]
    assert list(found) == [f"{number}_{mixer}_debug_seed{seed}" for number, (mixer, seed) in enumerate(jobs)]
    assert [(run["mixer"], run["seed"]) for run in found.values()] == jobs
    assert not any("=" in name for name in found)  # a path with one could not be given as ckpt=


@pytest.mark.slow
def test_one_bad_job_does_not_stop_the_others(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = "optimizer.lr=1e30,1e-3"
    with pytest.raises(SystemExit) as ending:
        sweep(corpus, tmp_path, monkeypatch, rates, "scheduler.warmup_steps=0", "trainer.gradient_clip_val=null")
    assert ending.value.code == 1
    assert "became NaN or infinite" in capsys.readouterr().err
    assert [run["status"] for run in results(tmp_path).values()] == ["diverged", "finished"]


def test_the_directory_of_a_single_run_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep(corpus, tmp_path, monkeypatch, f"hydra.run.dir={tmp_path}/one")
    assert "hydra.run.dir has no effect in a sweep, which uses hydra.sweep.dir" in capsys.readouterr().err
    assert not results(tmp_path)


def test_a_setting_that_no_job_can_read(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        sweep(corpus, tmp_path, monkeypatch, "seed=${nothing}")
    assert ending.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "Interpolation key 'nothing' not found" in line
