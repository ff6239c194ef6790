"""Jobs of experiments side by side, until a deadline."""

import json
import multiprocessing
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lkda.checks import InputError
from lkda.commands.sweeps import grid, grid_jobs
from lkda.commands.sweeps.grid import main, run_jobs, table
from lkda.commands.sweeps.grid_jobs import Job, jobs_of
from tests.commands.small import small_run


@pytest.mark.slow
def test_a_job_for_each_combination(tmp_path: Path) -> None:
    jobs = jobs_of(["ablations"], ["mixer=kda,{num_heads:4,kda:{gate:head}}", "trainer.max_steps=568"], tmp_path)
    names = [f"seed={seed}_mixer={mixer}" for seed in (1, 2) for mixer in ("kda", "num_heads=4_kda.gate=head")]
    assert [job.name for job in jobs] == [f"ablations/{name}" for name in names]
    assert jobs[0].directory == tmp_path / "ablations" / "seed=1_mixer=kda"
    assert set(jobs[3].overrides) == {
        *("experiment=ablations", "mixer={num_heads:4,kda:{gate:head}}", "seed=2", "trainer.max_steps=568")
    }
    assert jobs[0].seconds() == pytest.approx(25 + 568 / 30)
    assert jobs[0].seconds(per_gpu=3) == pytest.approx(25 + 3 * 568 / 30)
    assert jobs[0].seconds(per_gpu=3, slowdown=1.5) == pytest.approx(25 + 1.5 * 568 / 30)


SMALL_JOBS = {
    "mqar_by_state_size": ["mixer=conv_kda", "model.d_model=128", "optimizer.lr=3e-3"],
    "kimi_synthetics": ["mixer=kda", "data=stack", "data.context=512", "optimizer.lr=1e-3"],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("experiment", SMALL_JOBS)
def test_small_models_that_share_a_gpu_begin_before_a_deadline_of_ten_minutes(experiment: str, tmp_path: Path) -> None:
    (job,) = jobs_of([experiment], SMALL_JOBS[experiment], tmp_path)
    alone, beside_two = job.seconds(), job.seconds(per_gpu=3)
    assert alone is not None
    assert beside_two is not None
    assert alone < beside_two < 560 - grid.GRACE


ORDERS = {
    "lm_by_mixer": ("mixer", ["seed"]),
    "ablations": ("mixer", ["seed"]),
    "mqar_by_state_size": ("mixer optimizer.lr", ["model.d_model"]),
    "kimi_synthetics": ("mixer optimizer.lr data", ["data.context"]),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("experiment", ORDERS)
def test_a_grid_that_is_cut_off_has_whole_comparisons(experiment: str, tmp_path: Path) -> None:
    """All mixers are compared at one seed, width or length before the next one begins."""
    compared, outer = ORDERS[experiment]
    with initialize_config_dir(str(grid_jobs.CONFIGS), version_base="1.3"):
        params = compose("train", [f"experiment={experiment}"], return_hydra_config=True).hydra.sweeper.params
    assert [*params] == [*outer, *[name for name in params if name in compared.split()]]


def test_a_command_for_jobs_that_have_a_key(tmp_path: Path) -> None:
    jobs = jobs_of(["lm_by_mixer_full"], ["mixer=kda,softmax"], tmp_path)
    dtypes = [[word for line in job.then for word in line if word.startswith("state_dtype=")] for job in jobs]
    assert dtypes == [["state_dtype=float32", "state_dtype=bfloat16", "state_dtype=int8"], []]
    rates = [word for job in jobs for line in job.then for word in line if word.startswith("optimizer.lr=")]
    assert rates == ["optimizer.lr=0.002", "optimizer.lr=0.001"]


@pytest.fixture
def several_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment `several`, of three sweeps, is the only one."""
    shutil.copytree(grid_jobs.CONFIGS, tmp_path / "configs")
    shutil.rmtree(tmp_path / "configs" / "experiment")
    (tmp_path / "configs" / "experiment").mkdir()
    (tmp_path / "configs" / "experiment" / "several.yaml").write_text(SEVERAL)
    monkeypatch.setattr(grid_jobs, "CONFIGS", tmp_path / "configs")


SEVERAL = """# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {mixer: "kda,softmax"}}}
sweeps: ["", "optimizer.betas=[0.9,0.99] model.embed_norm=false", "mixer=softmax mixer.softmax.qk_norm=true,false"]
"""


def test_a_job_that_is_done_needs_no_exported_weights(tmp_path: Path) -> None:
    """Those are too large to be copied to another machine."""
    (job,) = jobs_of(["lm_by_mixer_full"], ["mixer=softmax"], tmp_path)
    for line in job.then:
        words = dict(word.partition("=")[::2] for word in line)
        path = Path(words["hydra.run.dir"], "summary.json") if line[0] == "train" else Path(words["out"])
        if line[0] != "export":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('{"status": "finished"}')
    (job.directory / "summary.json").write_text('{"status": "finished"}')
    assert (job.standing, job.commands()) == ("done", [])
    (job.directory / "text_8192.json").unlink()
    assert job.begins_again
    (only_exported,) = jobs_of(
        ["lm_by_mixer_full"], ["mixer=softmax", "then=['export ckpt={run} out={run}/x']"], tmp_path
    )
    assert [words[0] for words in only_exported._open()] == ["export"]


def test_a_training_that_diverged_is_not_repeated(tmp_path: Path) -> None:
    (job,) = jobs_of(["lm_by_mixer_full"], ["mixer=softmax"], tmp_path)
    (job.directory / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (job.directory / "summary.json").write_text('{"status": "finished"}')
    (job.directory / "long_context").mkdir()
    (job.directory / "long_context" / "summary.json").write_text('{"status": "diverged"}')
    assert [words[0] for words in job.commands()] == ["evaluate"]  # of the first training
    (job.directory / "test.json").touch()
    assert (job.standing, job.commands()) == ("diverged", [])
    (job.directory / "summary.json").write_text('{"status": "diverged"}')
    assert (job.standing, job.commands()) == ("diverged", [])


@pytest.mark.slow
@pytest.mark.usefixtures("several_sweeps")
def test_each_line_of_several_sweeps_is_added_to_the_sweep(tmp_path: Path) -> None:
    jobs = jobs_of(["several"], ["seed=4", "trainer.max_steps=5"], tmp_path)
    assert [job.name for job in jobs] == [
        *("several/mixer=kda", "several/mixer=softmax"),
        *(
            "several/mixer=kda_betas=_0.9_0.99_embed_norm=False",
            "several/mixer=softmax_betas=_0.9_0.99_embed_norm=False",
        ),
        *("several/mixer=softmax_qk_norm=True", "several/mixer=softmax_qk_norm=False"),
    ]
    given = {"experiment=several", "seed=4", "trainer.max_steps=5"}
    assert set(jobs[0].overrides) == given | {"mixer=kda"}
    assert set(jobs[3].overrides) == given | {"mixer=softmax", "optimizer.betas=[0.9,0.99]", "model.embed_norm=False"}
    assert set(jobs[5].overrides) == given | {"mixer=softmax", "mixer.softmax.qk_norm=False"}


@pytest.mark.sample(3)
@pytest.mark.usefixtures("several_sweeps")
@pytest.mark.parametrize(
    ("sweeps", "message"),
    [
        ("[seed=1, seed=1]", "two jobs would have the run directory several/seed=1"),
        ('["sample.prompt=\'a"]', "the sweep of several cannot be read"),
        ('["seed=[1"]', "the sweep of several cannot be read"),
        ("[no_such=1]", "several: Could not override 'no_such'. It has seed, "),
        ("{mixer: kda}", "sweeps of several must be a list of lines .*; got {'mixer': 'kda'}"),
    ],
)
def test_bad_sweeps(sweeps: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "configs" / "experiment" / "several.yaml").write_text(f"# @package _global_\nsweeps: {sweeps}\n")
    with pytest.raises(InputError, match=message):
        jobs_of(["several"], ["mixer=kda"], tmp_path)


def test_a_stopped_run_takes_less(tmp_path: Path) -> None:
    (job,) = jobs_of(["ablations"], ["mixer=kda", "seed=1", "trainer.max_steps=568"], tmp_path)
    assert job.standing == "not begun"
    (job.directory / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (job.directory / "metrics.csv").write_text("step,tokens\n100,3\n284,9\n")
    assert (job.standing, job.begins_again) == ("cut off", False)
    assert job.seconds() == pytest.approx(25 + 284 / 30)
    shutil.rmtree(job.directory / "checkpoints")  # nothing to go on from: as long as a new job
    assert (job.standing, job.begins_again) == ("cut off", True)
    assert job.seconds() == pytest.approx(25 + 568 / 30)
    (job.directory / "summary.json").write_text('{"status": "finished"}')
    assert job.seconds() == 0
    assert job.commands() == []
    assert (job.standing, job.begins_again) == ("done", False)


def test_a_job_without_weights_for_its_measurements_begins_again(tmp_path: Path) -> None:
    (job,) = jobs_of(["lm_by_mixer_full"], ["mixer=softmax"], tmp_path)
    job.directory.mkdir(parents=True)
    (job.directory / "summary.json").write_text('{"status": "finished"}')
    (job.directory / "test.json").write_text("{}")
    assert (job.standing, job.begins_again) == ("trained, not all measured", True)
    assert [words[0] for words in job.commands()] == ["train", *(line[0] for line in job.then)]
    job.set_aside()
    assert job.standing == "not begun"
    assert (job.directory.with_name(".seed=1_mixer=softmax.before") / "test.json").is_file()


def test_a_plan_names_what_only_again_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "lm_by_mixer_full" / "seed=1_mixer=softmax"
    run.mkdir(parents=True)
    (run / "summary.json").write_text('{"status": "finished"}')
    words = ["lm_by_mixer_full", "mixer=softmax", "--out", str(tmp_path), "--dry-run"]
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().out
    assert "0 of 1 jobs are to be done" in said
    assert re.search(r"mixer=softmax: trained, but test.json, exported, .*needle_131072.json is missing, and its", said)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give names of experiments: ablations, .*; got none"),
        (["ablation"], "got ablation"),
        (["ablations", "colour=red"], "ablations: Could not override 'colour'. It has seed, "),
        (["ablations", "seed=interval(1, 2)"], "the sweep of ablations cannot be read"),
        (["ablations", "seed=1,1"], "two jobs would have the run directory ablations/seed=1_mixer=kda"),
        (["ablations", "trainer.devices=2"], "trainer.devices=2: a job has one GPU"),
        (["lm_by_mixer_full", "then=['export ckpt=a']"], "needs out=..., which says whether it is done: export ckpt=a"),
        (["lm_by_mixer_full", "then=[{command:a}]"], "has the keys only_with and command; got {'command': 'a'}"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path) -> None:
    overrides = [word for word in words if "=" in word]
    with pytest.raises(InputError, match=message):
        jobs_of([word for word in words if "=" not in word], ["mixer=kda", *overrides], tmp_path)


def job(directory: Path, name: str, *, steps: int) -> Job:
    """Of 1 step per second. It imitates a run by writing its summary."""
    return Job(name, (), directory / name, steps, 0, 0, 1.0, ())


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Instead of lkda, a process that sleeps for a while, and writes a summary that says on which GPU it was."""
    (tmp_path / "imitated").mkdir()
    (tmp_path / "imitated" / "lkda.py").write_text(IMITATION)
    monkeypatch.setattr(grid.lkda, "__file__", str(tmp_path / "imitated" / "lkda.py" / "lkda"))
    monkeypatch.chdir(tmp_path / "imitated")  # `python -m` looks there first
    monkeypatch.setattr(grid, "GRACE", 2.0)
    return tmp_path


IMITATION = """
import json, os, signal, sys, time
from pathlib import Path
run = Path(next(word for word in sys.argv if word.startswith("hydra.run.dir="))[14:])
run.mkdir(exist_ok=True)
def end(status, code):
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES")
    text = json.dumps({"status": status, "gpu": gpu, "seconds": time.monotonic()})
    (run / "summary").write_text(text)
    (run / "summary").rename(run / "summary.json")  # a reader finds all of it
    sys.exit(code)
signal.signal(signal.SIGTERM, lambda *_: end("interrupted", 143))
if "fails" in run.name:
    print("error: no such data"); sys.exit(2)
(run / "ready").touch()
if "meets" in run.name:
    until = time.monotonic() + 5
    while len(list(run.parent.glob("meets_*/ready"))) < 2:
        if time.monotonic() > until: sys.exit(3)
        time.sleep(0.01)
time.sleep(30 if "long" in run.name else 0.1)
end("finished", 0)
"""


def ran(jobs: list[Job], **options: object) -> list[str]:
    return ran_and_failed(jobs, **options)[0]


def ran_and_failed(jobs: list[Job], **options: object) -> tuple[list[str], set[str]]:
    lines: list[str] = []
    given = {
        "gpus": ["3", "5"],
        "per_gpu": 1,
        "at_once": 1,
        "slowdown": 1.0,
        "deadline": None,
        "cut": False,
        "again": False,
    }
    given |= {"keep_checkpoints": False, **options}
    return lines, run_jobs(jobs, **given, said=lines.append)  # type: ignore[arg-type]


def test_jobs_begin_in_their_order_on_gpus_of_their_own(imitated: Path) -> None:
    jobs = [job(imitated, "a", steps=1), job(imitated, "b", steps=30), job(imitated, "c", steps=20)]
    lines = ran(jobs)
    assert lines[:2] == ["a: begins, about 1 s", "b: begins, about 30 s"]
    assert {"a: finished", "b: finished", "c: finished"} <= set(lines)
    assert {json.loads((imitated / name / "summary.json").read_text())["gpu"] for name in "ab"} == {"3", "5"}
    assert ran(jobs) == []  # nothing is to be done


def test_nothing_begins_that_would_not_end_in_time(imitated: Path) -> None:
    jobs = [job(imitated, "b", steps=100), job(imitated, "a", steps=1)]
    lines = ran(jobs, deadline=30.0, slowdown=2.0)
    assert lines[:3] == ["a: begins, about 2 s", "a: finished", "b: not begun, about 200 s"]
    assert lines[3:] == ["a job has to end 2 s before the deadline, which are kept for saving checkpoints"]
    assert [row[:2] for row in table(jobs)[1]] == [["b", "not begun"], ["a", "done"]]


@pytest.mark.slow
def test_on_another_machine_only_what_is_not_done_begins_again(imitated: Path) -> None:
    """The small files of two jobs were copied, without checkpoints: one is done and one was cut off."""
    jobs = [job(imitated, name, steps=1) for name in ("unmeasured", "cut", "ended", "new")]
    then = (("evaluate", f"hydra.run.dir={imitated}/m", f"out={imitated}/m/summary.json"),)
    jobs[0] = replace(jobs[0], then=then)
    for name, status in (("unmeasured", "finished"), ("cut", "interrupted"), ("ended", "finished")):
        (imitated / name).mkdir()
        (imitated / name / "summary.json").write_text(json.dumps({"status": status, "mark": 1}))
    lines = ran(jobs, gpus=["0"])
    left_out = (
        "unmeasured: trained, but ../m/summary.json is missing, and its weights are gone; --again trains it again"
    )
    assert lines[0] == left_out
    assert [line for line in lines if "begins" in line] == [
        "cut: begins again, as it has no checkpoint to go on from, about 1 s",
        "new: begins, about 1 s",
    ]
    assert json.loads((imitated / "unmeasured" / "summary.json").read_text())["mark"] == 1
    lines = ran(jobs, gpus=["0"], again=True)
    assert lines[0] == "unmeasured: begins again, as it has no checkpoint to go on from, about 1 s"
    assert json.loads((imitated / ".cut.before" / "summary.json").read_text())["mark"] == 1
    assert "mark" not in json.loads((imitated / "cut" / "summary.json").read_text())
    assert json.loads((imitated / "ended" / "summary.json").read_text())["mark"] == 1


@pytest.mark.slow
def test_a_job_is_stopped_at_the_deadline(imitated: Path) -> None:
    begun = time.monotonic()
    (imitated / "long" / "checkpoints").mkdir(parents=True)
    lines = ran([job(imitated, "long", steps=100)], deadline=3.5, cut=True)
    assert lines == ["long: begins, about 100 s", "long: stopped; the same command begins it again"]
    assert time.monotonic() - begun < 3.5
    assert (imitated / "long" / "checkpoints").is_dir()


def test_a_job_that_was_stopped_before_its_first_step(imitated: Path) -> None:
    """It was killed while it prepared its data, and has a table without a row."""
    one = job(imitated, "a", steps=1)
    quick = (imitated / "imitated" / "lkda.py").read_text()
    table_only = "open('../a/metrics.csv', 'w').write('step,tokens\\n')"
    (imitated / "imitated" / "lkda.py").write_text(f"import time; {table_only}; time.sleep(30)")
    again = "a: stopped before its first step; the same command begins it again"
    assert ran([one], deadline=4.0, cut=True) == ["a: begins, about 1 s", again]
    assert (imitated / "a" / "metrics.csv").exists()
    assert (one.standing, one.begins_again) == ("ended before its first step", False)
    assert ran([one], deadline=2.5)[0] == "a: ended before its first step, about 1 s"  # not in so short a time
    (imitated / "imitated" / "lkda.py").write_text(quick)
    lines = ran([one])
    assert lines == ["a: begins again, as it ended before its first step, about 1 s", "a: finished"]


@pytest.mark.slow
def test_a_measurement_that_fails_does_not_stop_the_others(imitated: Path) -> None:
    run = imitated / "a"
    then = tuple(("evaluate", f"hydra.run.dir={run}/{name}", f"out={run}/{name}/ready") for name in ("fails", "well"))
    after_export = (("export", f"hydra.run.dir={run}/fails_too", f"out={run}/exported"), *then)
    lines = ran([replace(job(imitated, "a", steps=1), then=then)])
    assert (run / "well" / "summary.json").is_file()
    assert lines[-1] == f"a: failed ({run}/grid.log): no such data"
    shutil.rmtree(run)
    ran([replace(job(imitated, "a", steps=1), then=after_export)])
    assert not (run / "well").exists()


def test_measurements_side_by_side(imitated: Path) -> None:
    """Two that wait for each other, and one that fails; the command after them begins when all have ended."""
    run = imitated / "a"
    names = ("meets_1", "meets_2", "fails")
    then = tuple(("evaluate", f"hydra.run.dir={run}/{name}", f"out={run}/{name}/summary.json") for name in names)
    after = ("train", f"hydra.run.dir={run}/after")
    one = replace(job(imitated, "a", steps=1), then=(*then, after))
    assert ran([one], at_once=2)[-1].startswith("a: failed")
    ends = {name: json.loads((run / name / "summary.json").read_text())["seconds"] for name in ("meets_1", "after")}
    assert ends["after"] > ends["meets_1"]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such signal")
def test_a_job_is_stopped_when_the_command_is_killed(imitated: Path) -> None:
    killed = multiprocessing.get_context("fork").Process(target=ran, args=([job(imitated, "long", steps=100)],))
    killed.start()
    _wait_for((imitated / "long" / "ready").exists)
    killed.kill()
    _wait_for((imitated / "long" / "summary.json").exists)
    assert json.loads((imitated / "long" / "summary.json").read_text())["status"] == "interrupted"


def _wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true() and time.monotonic() < until:
        time.sleep(0.05)
    assert true()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="there is no such signal")
def test_two_commands_at_once_share_the_jobs(imitated: Path) -> None:
    """The second does not take the first's run, which has no checkpoint yet, for one whose checkpoints are gone."""
    jobs = [job(imitated, "long", steps=5), job(imitated, "a", steps=1)]
    first = multiprocessing.get_context("fork").Process(target=ran, args=([jobs[0]],))
    first.start()
    _wait_for((imitated / "long" / "ready").exists)
    (imitated / "long" / "metrics.csv").write_text("step,tokens\n1,3\n")
    lines = ran(jobs, gpus=["0"], deadline=8.0)
    assert lines == [
        "long: another process is running it, which is waited for",
        *("a: begins, about 1 s", "a: finished", "long: not begun, about 5 s"),
        "a job has to end 2 s before the deadline, which are kept for saving checkpoints",
    ]
    assert not (imitated / ".long.before").exists()
    first.kill()
    _wait_for((imitated / "long" / "summary.json").exists)
    assert "long: begins again, as it has no checkpoint to go on from, about 5 s" in ran([jobs[0]], deadline=8.0)
    assert [path.name for path in imitated.glob(".*.lock")] == []


def test_the_reason_of_a_failed_job_is_not_that_of_an_earlier_attempt(imitated: Path) -> None:
    (imitated / "fails").mkdir()
    (imitated / "fails" / "grid.log").write_text("error: another one\n")
    (imitated / "imitated" / "lkda.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert ran([job(imitated, "fails", steps=9)])[-1] == f"fails: failed ({imitated}/fails/grid.log): killed by SIGKILL"
    (imitated / "imitated" / "lkda.py").write_text("print('Oh!'); exit(1)")
    assert ran([job(imitated, "fails", steps=9)])[-1] == f"fails: failed ({imitated}/fails/grid.log): Oh!"


def test_a_failed_job_does_not_stop_the_others(imitated: Path) -> None:
    jobs = [job(imitated, "fails", steps=9), job(imitated, "a", steps=1)]
    lines, failed = ran_and_failed(jobs, gpus=[])  # one after the other on the CPU
    assert lines[1] == f"fails: failed ({imitated}/fails/grid.log): no such data"
    assert lines[-1] == "a: finished"
    assert [row[:2] for row in table(jobs, failed)[1]] == [["fails", "failed"], ["a", "done"]]


# Each job is three processes that import torch; the tests above run several jobs side by side.
@pytest.mark.long  # the tests above imitate the commands
@pytest.mark.parametrize("mixers", ["softmax", "kda,softmax"])
def test_real_runs(mixers: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained, exported and measured; only the results are kept."""
    then = "then=['export ckpt={run} out={run}/exported','evaluate ckpt={run} out={run}/val.json']"
    settings = small_run(corpus, f"mixer={mixers}", "seed=1", "trainer.max_steps=40", then)
    words = ["lm_by_mixer_full", *settings, "--out", str(tmp_path), "--per-gpu", "2", "--slowdown", "1"]
    with pytest.raises(SystemExit) as ending:
        main([*words, "--deadline", "400"])
    assert ending.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"lm_by_mixer_full/seed=1_mixer=softmax +done +40", said), said
    names = mixers.split(",")
    for name in names:
        run = tmp_path / "lm_by_mixer_full" / f"seed=1_mixer={name}"
        assert (run / "val.json").is_file()
        assert not (run / "checkpoints").exists()
        assert list((run / "exported").iterdir()) == []
    with pytest.raises(SystemExit):
        main(words)
    assert f"0 of {len(names)} jobs are to be done" in capsys.readouterr().out
