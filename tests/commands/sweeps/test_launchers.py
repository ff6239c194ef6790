"""Sweeps by Hydra's plugins: jobs at the same time on GPUs of their own, on a cluster, and a search."""

import json
import os
import re
import runpy
import select
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig

from lkda.checks import InputError
from lkda.commands.command_line.errors import readable_errors
from lkda.commands.compare import compare
from lkda.commands.run import launch
from lkda.commands.run.run_setup import plan_run
from lkda.commands.sweeps.sweep_gpus import defaults_of_plugins, jobs_at_once, visible_gpus, wait_for_gpus
from lkda.commands.train import train
from tests.commands.error_line import error_line
from tests.commands.ranks import on_ranks
from tests.commands.small import ROOT, composed, small_run

BAD_AND_GOOD = ("scheduler.warmup_steps=0", "trainer.gradient_clip_val=null", "trainer.max_steps=3")


def test_two_processes_never_have_one_gpu(tmp_path: Path) -> None:
    def claim(rank: int) -> tuple[list[str], float, float]:
        chosen = wait_for_gpus(["0", "1"], needed=1, places=1, folder=tmp_path / "locks")
        begin = time.monotonic()
        time.sleep(0.3)
        return chosen, begin, time.monotonic()

    found = on_ranks(4, claim, tmp_path / "ranks")
    for gpu in ("0", "1"):
        times = sorted((begin, end) for (name,), begin, end in found if name == gpu)
        assert times
        assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:]))


def test_they_share_one_if_asked(tmp_path: Path) -> None:
    def claim(rank: int) -> list[str]:
        """Holds the GPU until the other has it too, or for 30 seconds if that waits."""
        chosen = wait_for_gpus(["3"], needed=1, places=2, folder=tmp_path / "locks")
        (tmp_path / f"has_it_{rank}").touch()
        until = time.monotonic() + 30
        while not (both := (tmp_path / f"has_it_{1 - rank}").exists()) and time.monotonic() < until:
            time.sleep(0.01)
        return chosen if both else []

    assert on_ranks(2, claim, tmp_path / "ranks") == [["3"], ["3"]]


@pytest.mark.slow
def test_a_job_may_have_several(tmp_path: Path) -> None:
    def claim(rank: int) -> list[str]:
        return wait_for_gpus(["0", "1", "2"], needed=2, places=1, folder=tmp_path / "locks")

    assert on_ranks(2, claim, tmp_path / "ranks") == [["0", "1"], ["0", "1"]]  # one after the other


def test_the_default_is_a_job_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert visible_gpus() == ["2", "5"]
    assert [jobs_at_once(places) for places in (1, 3)] == [2, 6]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert jobs_at_once(1) == 1
    with pytest.raises(InputError, match="jobs_per_gpu must be a whole number of 1 or more, got 0"):
        jobs_at_once(0)


def test_what_is_given_is_kept() -> None:
    assert defaults_of_plugins(["-m", "hydra/launcher=joblib"]) == ["hydra.launcher.n_jobs=${lkda_jobs_at_once:}"]
    assert defaults_of_plugins(["hydra/launcher=joblib", "hydra.launcher.n_jobs=3"]) == []
    assert defaults_of_plugins(["hydra/sweeper=optuna"]) == ["hydra.sweeper.max_failure_rate=1.0"]


@pytest.mark.parametrize(
    ("plugin", "words", "message"),
    [
        (
            "joblib_launcher",
            "hydra/launcher=joblib jobs_per_gpu=0",
            "jobs_per_gpu must be a whole number of 1 or more, got 0.",
        ),
        (
            "joblib_launcher",
            "hydra/launcher=joblib hydra.launcher.n_jobs=0",
            "hydra.launcher.n_jobs must be the number of jobs at once, or -1 for as many as there are CPU cores, "
            "got 0.",
        ),
        (
            "joblib_launcher",
            "hydra/launcher=joblib hydra.launcher.n_jobs=many",
            "hydra.launcher.n_jobs must be the number of jobs at once, or -1 for as many as there are CPU cores, "
            "got many.",
        ),
        (
            "optuna_sweeper",
            "hydra/sweeper=optuna hydra.sweeper.n_trials=0",
            "hydra.sweeper.n_trials must be a whole number of 1 or more, got 0.",
        ),
        (
            "optuna_sweeper",
            "hydra/sweeper=optuna hydra.sweeper.n_jobs=0",
            "hydra.sweeper.n_jobs must be a whole number of 1 or more, got 0.",
        ),
    ],
)
def test_no_jobs_at_all(
    plugin: str, words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}")
    given = ["-m", "debug=fast", "trainer=cpu", "seed=1,2", *words.split()]
    assert error_line("train.py", given, monkeypatch, capsys) == f"error: {message}"


def swept(corpus: Path, directory: Path, *overrides: str, gpus: str = "") -> subprocess.CompletedProcess[str]:
    words = [*small_run(corpus), "trainer.accelerator=auto", "sample.max_new_tokens=0", *BAD_AND_GOOD, *overrides]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *words, f"hydra.sweep.dir={directory}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def assert_named(directory: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first job failed and the second finished, and compare.py says so."""
    assert json.loads((directory / "1_kda_debug_seed1" / "summary.json").read_text())["status"] == "finished"
    compare(composed("compare", f"runs={directory}/*_kda_*", f"out={out}"))
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"left out \S*0_kda_debug_seed1: failed: the loss became NaN or infinite at step 2", shown)


def test_a_machine_without_slurm_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # also on a cluster
    with pytest.raises(SystemExit) as ending, readable_errors():
        submitit.AutoExecutor(cluster="slurm", folder=tmp_path / "jobs")
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: hydra/launcher=submitit_slurm needs Slurm, and this machine has no srun and sbatch")


@pytest.mark.long
def test_joblib(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = swept(corpus, tmp_path / "runs", "hydra/launcher=joblib", "optimizer.lr=1e30,1e-3", gpus="0,1")
    assert done.returncode == 1  # one job failed
    used = re.findall(r"^this process uses CUDA_VISIBLE_DEVICES=(\d)$", done.stdout, re.MULTILINE)
    assert len(used) == len(set(used)) > 0
    assert_named(tmp_path / "runs", tmp_path / "comparison", capsys)


@pytest.mark.long
def test_more_workers_than_gpus(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = swept(corpus, tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "seed=1,2", gpus="0,1")
    assert "error: hydra.launcher.n_jobs=3 jobs at once, each on 1 GPU, need more than the 2 GPUs here" in done.stderr
    assert "give hydra.launcher.n_jobs=2, or a larger jobs_per_gpu" in done.stderr


@pytest.mark.long
def test_submitit_on_this_machine(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With submitit's local executor. On a cluster its Slurm executor takes its place."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = swept(corpus, tmp_path / "runs", "hydra/launcher=submitit_local", "optimizer.lr=1e30,1e-3")
    assert done.returncode == 1
    assert_named(tmp_path / "runs", tmp_path / "comparison", capsys)


@pytest.mark.long
def test_optuna(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on after a failed run, and finds the rate of the other."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=1")
    words = [*search, "hydra.sweeper.sampler.seed=1", "optimizer.lr=choice(1e30,1e-3)"]
    words += [*small_run(corpus, "sample.max_new_tokens=0", *BAD_AND_GOOD), f"hydra.sweep.dir={tmp_path / 'runs'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *words])
    runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    best = yaml.safe_load((tmp_path / "runs" / "optimization_results.yaml").read_text())
    assert best["best_params"] == {"optimizer.lr": 1e-3}
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/summary.json")]
    assert {summary["status"] for summary in summaries} == {"finished", "diverged"}
    assert {summary["val/loss"] for summary in summaries if summary["status"] == "finished"} == {best["best_value"]}


@pytest.mark.long
def test_a_search_without_a_finished_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    optuna = pytest.importorskip("optuna")
    with pytest.raises(SystemExit), readable_errors():
        _ = optuna.create_study().best_trial
    assert "error: no run of the search has finished, so there is no best one" in capsys.readouterr().err


def test_a_wrong_number_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    joblib = pytest.importorskip("joblib")
    with pytest.raises(SystemExit), readable_errors():
        joblib.Parallel(n_jobs=0)([])
    assert "error: a setting cannot be used: n_jobs == 0 in Parallel has no meaning" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "argument", "started"),
    [
        (None, "scripts/train.py", (None, "scripts/train.py", [])),
        ("lkda.__main__", "lkda/__main__.py", ("lkda.__main__", "lkda/__main__.py", ["train"])),
        ("joblib.externals.loky.backend.popen_loky_posix", "scripts/train.py", ("lkda.__main__", None, ["train"])),
        ("submitit.core._submit", "submitit/core/_submit.py", ("lkda.__main__", None, ["train"])),
    ],
)
def test_a_worker_starts_the_command_and_not_its_launcher(
    module: str | None,
    argument: str,
    started: tuple[str | None, str | None, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lightning starts the other processes of a run with the main module, or with the file if there is none."""
    main = ModuleType("__main__")
    main.__spec__ = None if module is None else ModuleSpec(module, None)
    before = main.__spec__
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [argument, "--of-the-launcher"])
    monkeypatch.setattr(launch, "given_overrides", lambda without: ["seed=2"])
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    name, file, words = started
    with launch._arguments_of_this_run():
        assert (main.__spec__ and main.__spec__.name) == name
        assert file in (None, sys.argv[0])
        assert sys.argv[1:] == [*words, "seed=2"]
    assert (main.__spec__, sys.argv) == (before, [argument, "--of-the-launcher"])


def test_several_processes_for_one_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train the same model by itself."""
    options = plan_run(composed("train", "debug=fast", "data=random", "trainer=cpu"), Path("nowhere")).trainer
    for name, value in {"TORCHELASTIC_RUN_ID": "one", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    launch.Processes(options, accelerator="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torchrun has started 2 processes, .*: choose trainer=ddp or trainer=fsdp\."):
        launch.Processes(options, accelerator="cpu")


def test_a_process_ends_after_the_one_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if that was killed, and nothing interrupts what it waits for."""
    monkeypatch.setattr(launch, "_SECONDS_TO_REPORT", 0.1)
    reader, writer = os.pipe()
    first = os.fork()
    if not first:
        if not os.fork():
            parent = os.getppid()
            os.write(writer, b"x")
            launch._end_with_parent(parent)  # as its thread does
            os._exit(0)
        os.read(reader, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == -signal.SIGKILL
    assert select.select([reader], [], [], 20)[0]  # the other has closed its end, because it has ended
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_no_process_of_a_run_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs is killed when the run ends, and none is watched any more in the next run of a sweep."""
    options = plan_run(composed("train", "debug=fast", "data=random", "trainer=cpu"), Path("nowhere")).trainer
    processes = launch.Processes(options, accelerator="cpu")
    others = [subprocess.Popen(["sleep", seconds]) for seconds in ("0", "100")]
    os.kill(others[1].pid, signal.SIGSTOP)
    processes._others = watched = list(others)
    monkeypatch.setattr(launch, "_SECONDS_TO_END", 0.5)
    processes._end_others()
    assert [other.returncode for other in others] == [0, -signal.SIGKILL]
    assert watched == []


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_on_several_devices(launcher: str, corpus: Path, tmp_path: Path) -> None:
    """The worker processes start the other processes of their runs."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    devices = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    done = swept(corpus, tmp_path, f"hydra/launcher={launcher}", *devices, "seed=1,2")
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["finished"] * 2
    assert {summary["device"][:3] for summary in summaries} == {"2 x"}


def test_a_run_that_begins_again_has_not_failed(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "failure.txt").write_text("out of memory\n")
    words = small_run(corpus, "sample.max_new_tokens=0", "trainer.max_steps=1")
    train(composed("train", *words), tmp_path)
    assert not (tmp_path / "failure.txt").exists()
