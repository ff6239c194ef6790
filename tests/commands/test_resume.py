"""A run that was stopped, by whatever means and at whatever moment, ends as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lkda.checks import InputError
from lkda.commands.run.run_directory import RunDirectory
from lkda.commands.train import train
from lkda.training.checkpoint import read_checkpoint, step_files, step_path
from lkda.training.metrics_csv import MetricsCSV
from lkda.training.task import LanguageModelTask
from tests.commands.small import ROOT, composed, rows, small_run

LONG = (
    "trainer.max_steps=90",
    "trainer.val_check_interval=16",
    "checkpoint.every_n_steps=5",
    "trainer.log_every_n_steps=2",
)
SHORT = ("trainer.max_steps=7",)  # saves every 2 steps, validates every 3 and at the end
SHORTER = ("trainer.max_steps=4", "sample.max_new_tokens=0")

Rows = list[dict[str, str]]


def run(corpus: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    return train(composed("train", *small_run(corpus, *overrides)), directory)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Rows]:
    """The rows of a run that nothing stops."""
    known: dict[tuple[str, ...], Rows] = {}

    def rows_of(overrides: tuple[str, ...]) -> Rows:
        if overrides not in known:
            directory = tmp_path_factory.mktemp("uninterrupted") / "run"
            run(corpus, directory, *overrides)
            known[overrides] = rows(directory)
        return known[overrides]

    return rows_of


@pytest.fixture(scope="module")
def short_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("short") / "run"
    run(corpus, directory, *SHORTER)
    return directory


def stopped_by(signum: int, corpus: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """scripts/train.py as a user runs it, sent `signum` in the middle of training."""
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        *small_run(corpus, *LONG),
        f"hydra.run.dir={directory}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = directory / "metrics.csv"
    while not metrics.exists() or metrics.read_text().count("\n") < 14:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.long  # test_faults.py kills at random moments, and test_killed_at_writes at every write
def test_kill_9_in_the_middle(corpus: Path, tmp_path: Path, uninterrupted: Any, capsys: Any) -> None:
    directory = tmp_path / "run"
    assert stopped_by(signal.SIGKILL, corpus, directory).returncode == -signal.SIGKILL
    assert len(rows(directory)) < len(uninterrupted(LONG))
    assert not (directory / "summary.json").exists()
    capsys.readouterr()
    summary = run(corpus, directory, *LONG, "resume=true")
    assert "resuming from step " in capsys.readouterr().out
    assert summary["status"] == "finished"
    assert rows(directory) == uninterrupted(LONG)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


# The test below sends them to its own process, in CI the first.
IN_A_PROCESS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] == signal.SIGTERM else pytest.mark.long) for pair in SIGNALS
]


@pytest.mark.parametrize(("signum", "exit_code"), IN_A_PROCESS)
def test_ctrl_c_and_sigterm(signum: int, exit_code: int, corpus: Path, tmp_path: Path, uninterrupted: Any) -> None:
    directory = tmp_path / "run"
    done = stopped_by(signum, corpus, directory)
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert f"hydra.run.dir={directory} resume=true" in done.stdout.replace("\n", " ")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert step_path(directory / "checkpoints", summary["steps"]).exists()  # not a step is lost
    assert f"after step {summary['steps']}." in done.stdout
    assert summary["tokens"] == summary["steps"] * 64
    run(corpus, directory, *LONG, "resume=true")
    assert rows(directory) == uninterrupted(LONG)


@pytest.mark.parametrize(
    ("signum", "exit_code"), [*SIGNALS[:1], *(pytest.param(*pair, marks=pytest.mark.long) for pair in SIGNALS[1:])]
)
def test_a_signal_during_a_step(
    signum: int,
    exit_code: int,
    corpus: Path,
    tmp_path: Path,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """The step is finished and saved."""

    def interrupted(logger: MetricsCSV, metrics: dict[str, float], step: int | None = None) -> None:
        log_metrics(logger, metrics, step)
        if step == 4:
            os.kill(os.getpid(), signum)

    log_metrics = MetricsCSV.log_metrics
    monkeypatch.setattr(MetricsCSV, "log_metrics", interrupted)
    directory = tmp_path / "run"
    with pytest.raises(SystemExit) as ending:
        run(corpus, directory, *SHORT)
    assert ending.value.code == exit_code
    monkeypatch.undo()
    assert f"hydra.run.dir={directory} resume=true" in capsys.readouterr().out.replace("\n", "")
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["status"], summary["tokens"]) == ("interrupted", summary["steps"] * 64)
    assert 4 <= summary["steps"] < 7
    assert step_path(directory / "checkpoints", summary["steps"]).exists()
    run(corpus, directory, *SHORT, "resume=true")
    assert rows(directory) == uninterrupted(SHORT)


class Killed(BaseException):
    """Ends the process in the place where it is raised, as far as a test can."""


@pytest.mark.parametrize("every", [pytest.param(4, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_writes(
    every: int, corpus: Path, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file was just renamed, linked or appended to when the kill came, the resumed run is the same run."""
    left, dead = 0, False

    def fatal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left, dead
            if dead:  # the other thread of the process, which writes checkpoints, writes nothing more either
                raise Killed
            result = function(*args, **kwargs)
            left -= 1
            if left == 0:
                dead = True
                raise Killed
            return result

        return call

    monkeypatch.setattr(os, "replace", fatal(os.replace))
    monkeypatch.setattr(os, "link", fatal(os.link))
    monkeypatch.setattr(MetricsCSV, "log_metrics", fatal(MetricsCSV.log_metrics))
    write = 1
    while True:
        directory = tmp_path / str(write)
        left = write
        try:
            run(corpus, directory, *SHORTER)
        except Killed:
            left, dead = 0, False
            assert run(corpus, directory, *SHORTER, "resume=true")["status"] == "finished"
            assert rows(directory) == uninterrupted(SHORTER), f"killed at write {write}"
            write += every
        else:
            break
    assert write > 20


def test_a_finished_run_stays_as_it_is(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    directory = tmp_path / "run"
    first = run(corpus, directory, *SHORT)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(corpus, directory, *SHORT, "resume=true") == first
    said = "holds a finished run of 7 steps: nothing to do. To train on, set trainer.max_steps to more than 7.\n"
    assert said in capsys.readouterr().out
    assert run(corpus, directory, *SHORT, "trainer.max_steps=5", "resume=true") == first
    assert said in capsys.readouterr().out
    assert run(corpus, directory, *SHORT, "trainer.max_tokens=448", "resume=true") == first
    assert said.replace("max_steps to more than 7", "max_tokens to more than 448") in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_more_steps_go_on_from_the_end(corpus: Path, tmp_path: Path, uninterrupted: Any, capsys: Any) -> None:
    """With a schedule that does not depend on the length, 4 steps and then 3 are 7 steps."""
    directory = tmp_path / "run"
    constant = "scheduler=constant"
    run(corpus, directory, constant, "trainer.max_steps=6")
    run(corpus, directory, constant, *SHORT, "resume=true")
    assert "resuming from step 6" in capsys.readouterr().out
    found, expected = rows(directory), uninterrupted((constant, *SHORT))
    first_end = next(row for row in found if row["test/loss"])
    assert first_end["step"] == "6"  # where the run ended at first; the test split is measured at each end
    assert found[-1] == expected[-1]
    assert found[-1]["test/loss"]
    first_end.update((name, "") for name in first_end if name.startswith("test/"))
    assert found == expected


def weights(directory: Path) -> dict[str, Any]:
    """The last checkpoint's weights and optimiser state, by name."""
    saved = read_checkpoint(directory / "checkpoints" / "last.ckpt")
    optimizer = saved["optimizer_states"][0]
    state = {f"{n}.{key}": value for n, of in optimizer["state"].items() for key, value in of.items()}
    return {**saved["state_dict"], **state, "lr": torch.tensor([group["lr"] for group in optimizer["param_groups"]])}


def assert_the_same_run(directory: Path, straight: Path) -> None:
    """To the last bit: every row but for the times, and the weights and optimiser state at the end."""
    assert rows(directory) == rows(straight)
    ours, theirs = weights(directory), weights(straight)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("pieces", "validate", "save", "log"),
    [
        pytest.param(3, 4, 2, 3, marks=pytest.mark.slow),
        pytest.param(4, 6, 3, 2, marks=pytest.mark.long),
        pytest.param(6, 5, 4, 5, marks=pytest.mark.long),
        pytest.param(3, 1, 7, 4, marks=pytest.mark.long),
    ],
)
def test_a_run_that_accumulates_resumes_as_the_same_run(
    pieces: int, validate: int, save: int, log: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a step, with intervals that do not divide each other: checkpoints lie at whole steps."""
    settings = (
        f"trainer.accumulate_grad_batches={pieces}",
        f"trainer.val_check_interval={validate}",
        f"checkpoint.every_n_steps={save}",
        f"trainer.log_every_n_steps={log}",
        "trainer.max_steps=8",
        "trainer.limit_val_batches=1",
        "data.batch_size=1",
        "sample.max_new_tokens=0",
    )
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(corpus, straight, *settings)
    assert [int(row["step"]) for row in rows(straight) if row["val/loss"]] == [
        step for step in range(1, 9) if step % validate == 0 or step == 8
    ]
    left = 6 * pieces + 2  # the second batch of the seventh step

    def fatal(task: LanguageModelTask, batch: Any, batch_idx: int) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return training_step(task, batch, batch_idx)

    training_step = LanguageModelTask.training_step
    monkeypatch.setattr(LanguageModelTask, "training_step", fatal)
    with pytest.raises(Killed):
        run(corpus, resumed, *settings)
    monkeypatch.undo()
    for path in step_files(resumed / "checkpoints"):
        saved = read_checkpoint(path)
        batches = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert batches == saved["lkda"]["step"] * pieces
    assert run(corpus, resumed, *settings, "resume=true")["status"] == "finished"
    assert_the_same_run(resumed, straight)


@pytest.mark.parametrize(
    "scheduler", [pytest.param("wsd", marks=pytest.mark.slow), pytest.param("cosine", marks=pytest.mark.long)]
)
def test_a_finished_run_that_goes_on_has_the_rates_of_the_longer_run(
    scheduler: str, corpus: Path, tmp_path: Path
) -> None:
    """The rate of a step is a function of the step and the settings, not of where the run once ended."""

    def rates(directory: Path) -> list[str]:
        return [row["lr"] for row in rows(directory) if row["lr"]]

    settings = (
        f"scheduler={scheduler}",
        "scheduler.warmup_steps=2",
        "trainer.limit_val_batches=1",
        "sample.max_new_tokens=0",
    )
    run(corpus, tmp_path / "short", *settings, "trainer.max_steps=5")
    run(corpus, tmp_path / "short", *settings, "trainer.max_steps=10", "resume=true")
    run(corpus, tmp_path / "long", *settings, "trainer.max_steps=10")
    longer = rates(tmp_path / "long")
    assert len(longer) == 10
    assert rates(tmp_path / "short")[5:] == longer[5:]
    assert all(float(rate) > 0 for rate in longer)


@pytest.mark.sample(2)
@pytest.mark.parametrize("left", ["last.ckpt", "best.ckpt"])
def test_what_is_left_of_the_checkpoints_is_resumed_from(
    left: str, corpus: Path, tmp_path: Path, uninterrupted: Any, capsys: Any
) -> None:
    directory = tmp_path / "run"
    run(corpus, directory, *SHORT)
    for path in (directory / "checkpoints").iterdir():
        if path.name != left:
            path.unlink()
    (directory / "summary.json").unlink()
    step = read_checkpoint(directory / "checkpoints" / left)["lkda"]["step"]
    kept = (directory / "checkpoints" / left).read_bytes()
    capsys.readouterr()
    run(corpus, directory, *SHORT, "resume=true")
    assert f"resuming from step {step}" in capsys.readouterr().out
    assert step_path(directory / "checkpoints", step).read_bytes() == kept
    assert rows(directory) == uninterrupted(SHORT)


@pytest.mark.slow
def test_a_lost_best_is_taken_from_the_validations_to_come(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    constant = "scheduler=constant"
    run(corpus, directory, constant, "trainer.max_steps=4", "sample.max_new_tokens=0")
    best = directory / "checkpoints" / "best.ckpt"
    best.unlink()
    summary = run(corpus, directory, constant, "trainer.max_steps=7", "sample.max_new_tokens=0", "resume=true")
    assert summary["status"] == "finished"
    losses = {int(row["step"]): float(row["val/loss"]) for row in rows(directory) if row["val/loss"]}
    assert min(losses, key=losses.__getitem__) in (6, 7)  # the loss still falls, so the lost one was not the best
    assert read_checkpoint(best)["lkda"]["step"] == min(losses, key=losses.__getitem__)


def test_checkpoints_without_their_run_are_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(corpus, directory, *SHORT)
    (directory / "config.yaml").unlink()
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    for words in ((), ("resume=true",)):
        with pytest.raises(ValueError, match=r"holds a run whose config\.yaml is missing"):
            run(corpus, directory, *SHORT, *words)
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_fewer_steps_than_are_done_leave_nothing_to_train(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(corpus, directory, *SHORT, "trainer.val_check_interval=5")
    (directory / "summary.json").unlink()
    before = (directory / "metrics.csv").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"has already done 7 steps, so 5 steps leave nothing to train: give trainer.max_steps=8 or more",
    ):
        run(corpus, directory, *SHORT, "trainer.val_check_interval=5", "trainer.max_steps=5", "resume=true")
    # At step 6 a checkpoint was written without a validation.
    step_path(directory / "checkpoints", 7).unlink()
    (directory / "checkpoints" / "last.ckpt").unlink()
    (directory / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(
        ValueError,
        match=r"has already done 6 steps, so 6 steps leave nothing to train: give trainer.max_steps=7 or more",
    ):
        run(corpus, directory, *SHORT, "trainer.val_check_interval=5", "trainer.max_steps=6", "resume=true")
    assert (directory / "metrics.csv").read_bytes() == before


@pytest.mark.sample(2)
@pytest.mark.parametrize("damage", ["truncated", "a flipped bit"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: str, corpus: Path, tmp_path: Path, uninterrupted: Any
) -> None:
    directory = tmp_path / "run"
    run(corpus, directory, *SHORT)
    newest = step_path(directory / "checkpoints", 7)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor
    newest.write_bytes(content[:1000] if damage == "truncated" else content)
    with pytest.warns(UserWarning, match=r"skipping a broken checkpoint: .*step_0000007\.ckpt"):
        run(corpus, directory, *SHORT, "resume=true")
    assert rows(directory) == uninterrupted(SHORT)


def test_resume_starts_afresh_where_nothing_is_saved(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    assert run(corpus, tmp_path / "run", *SHORT, "resume=true")["steps"] == 7
    assert "no checkpoint is saved here yet: starting from step 0" in capsys.readouterr().out


def test_a_directory_that_holds_a_run_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", *SHORT)
    with pytest.raises(ValueError, match=r"already holds a run. Continue it with resume=true"):
        run(corpus, tmp_path / "run", *SHORT)


def test_a_run_with_other_settings_does_not_resume(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", *SHORT)
    with pytest.raises(
        ValueError, match=r"other settings \(model.d_model: 32 is recorded, 64 is given; optimizer.lr: "
    ):
        run(corpus, tmp_path / "run", *SHORT, "resume=true", "model.d_model=64", "optimizer.lr=0.5")


def test_two_processes_do_not_share_a_directory(corpus: Path, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training in"):
        run(corpus, tmp_path / "run", *SHORT)
    other.release()
    run(corpus, tmp_path / "run", *SHORT)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b"{", r"summary\.json is damaged: it is not JSON \(.*Put it back, or move it away"),
        ("summary.json", b"[]", r"summary\.json is damaged: it holds no table of values"),
        ("metrics.csv", b"\xff\x00\n1,2\n", r"metrics\.csv is damaged: not each of its rows is of one step of a run"),
        ("metrics.csv", b"step,tokens\n1,2\n,\n", r"metrics\.csv is damaged"),
    ],
)
def test_a_damaged_record_is_refused(
    name: str, content: bytes, message: str, short_run: Path, corpus: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(short_run, directory)
    (directory / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        # A run that is finished already has its summary read, and another its metrics.
        run(corpus, directory, *SHORTER, *(("trainer.max_steps=5",) if name == "metrics.csv" else ()), "resume=true")
    assert (directory / name).read_bytes() == content


def test_rows_that_are_missing_are_named(short_run: Path, corpus: Path, tmp_path: Path, capsys: Any) -> None:
    """A file that is put back loses nothing, and without the file the run goes on."""
    directory = tmp_path / "run"
    shutil.copytree(short_run, directory)
    longer = (*SHORTER, "trainer.max_steps=5", "resume=true")
    metrics = directory / "metrics.csv"
    content = metrics.read_text()
    damaged = "".join(content.splitlines(keepends=True)[:3])
    metrics.write_text(damaged)
    with pytest.raises(
        InputError, match=r"metrics\.csv is damaged: the row of step 4 .* continues from step 4, .* is of step 2\. Put"
    ):
        run(corpus, directory, *longer)
    assert metrics.read_text() == damaged
    metrics.unlink()
    capsys.readouterr()
    assert run(corpus, directory, *longer)["status"] == "finished"
    assert f"warning: {metrics} has no row up to step 4" in capsys.readouterr().out
    assert {row["step"] for row in rows(directory)} == {"5"}
