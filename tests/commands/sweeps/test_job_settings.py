"""The settings of a grid's jobs are checked before the first job begins, also against what the run directories hold."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from lkda.checks import InputError
from lkda.commands.run.run_setup import plan_run
from lkda.commands.sweeps import grid
from lkda.commands.sweeps.grid import main
from lkda.commands.sweeps.grid_jobs import Job, jobs_of
from tests.commands.error_line import error_line
from tests.commands.small import ROOT

TEXT = ("data=files", "model.vocab_size=300", "~callbacks.learnt")
TASK = ("mixer=kda", "data=palindrome", "data.context=16", "optimizer.lr=1e-3")


def job_of(out: Path, *settings: str, experiment: str = "kimi_synthetics") -> Job:
    (job,) = jobs_of([experiment], [*TASK, *settings], out)
    return job


def recorded(job: Job) -> dict[str, Any]:
    """What the training of the job writes into config.yaml."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return plan_run(compose("train", [*job.overrides]), Path("nowhere")).record


def leave_a_run(job: Job, status: str = "finished", **changed: Any) -> Path:
    """The small files of a run of the job, without its checkpoints."""
    job.directory.mkdir(parents=True)
    (job.directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recorded(job) | changed)))
    (job.directory / "summary.json").write_text(json.dumps({"status": status}))
    (job.directory / "metrics.csv").write_text("step,tokens\n2,3\n")
    return job.directory


def printed_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command ends."""
    with pytest.raises(SystemExit) as ending:
        main(words)
    found = capsys.readouterr()
    assert (ending.value.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    return found.err.strip()


OTHERS = {
    "model.d_model=64": "model.d_model: 256 is recorded, 64 is given",
    "seed=2": "seed: 1 is recorded, 2 is given",
    "trainer.max_steps=5": "trainer.max_steps: 20000 is recorded, 5 is given",
    "trainer.max_tokens=5000": "trainer.max_tokens: None is recorded, 5000 is given",
    "callbacks.learnt.accuracy=0.5": "callbacks.learnt.accuracy: 0.99 is recorded, 0.5 is given",
    "~callbacks.learnt": "callbacks.learnt.accuracy: 0.99 is recorded, None is given",
    "trainer.precision=64-true": "trainer.precision: 32-true is recorded, 64-true is given",
    "init_from=exported/one": "init_from: None is recorded, .*exported/one is given",
}


@pytest.mark.parametrize("setting", OTHERS)
def test_a_run_with_other_settings_is_not_taken_for_done(setting: str, tmp_path: Path) -> None:
    directory = leave_a_run(job_of(tmp_path))
    assert job_of(tmp_path).standing == "done"
    with pytest.raises(InputError) as caught:
        job_of(tmp_path, setting)
    name = "kimi_synthetics/context=16_data=palindrome_mixer=kda_lr=0.001"
    assert str(caught.value).startswith(f"{name}: {directory} holds a run with other settings (")
    assert caught.match(OTHERS[setting])
    assert str(caught.value).endswith("Give another --out, or the recorded settings.")


@pytest.mark.sample(2)
@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_no_job_begins_if_a_later_one_has_other_settings(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grid, "run_jobs", None)
    leave_a_run(job_of(tmp_path, "mixer=softmax"))
    words = ["kimi_synthetics", *TASK, "mixer=kda,softmax", "seed=2", "--out", str(tmp_path), *more]
    assert "mixer=softmax_lr=0.001 holds a run with other settings (data.seed: 1 " in printed_error(words, capsys)


@pytest.mark.parametrize(
    "setting",
    [
        "callbacks=none",
        "backend=chunk",
        "checkpoint.keep=3",
        "trainer.log_every_n_steps=3",
        "data.num_workers=1",
        "trainer.precision=32",  # as 32-true
    ],
)
def test_what_a_resumed_run_may_change_is_no_other_setting(setting: str, tmp_path: Path) -> None:
    leave_a_run(job_of(tmp_path))
    assert job_of(tmp_path, setting).standing == "done"


def measured(job: Job, **changed: Any) -> None:
    """What `evaluate` writes for the job's run, on its own data."""
    ran = {"split": "validation", "stepwise": False, "state_dtype": None, "max_batches": None, "precision": "float32"}
    ran |= {"kind": "evaluation", "run": {}, "data": recorded(job)["data"], "result": {"loss": 1.0}}
    (job.directory / "val.json").write_text(json.dumps(ran | changed))


def job_with(out: Path, then: str) -> Job:
    """A job of an experiment that may have commands after the training."""
    return job_of(out, "model=recall", then, experiment="lm_by_mixer_full")


MEASUREMENTS = {
    "max_batches=3": r"max_batches: None is recorded, 3 is given",
    "precision=bf16-mixed": r"precision: float32 is recorded, bfloat16 is given",
    "stepwise=true": r"stepwise: False is recorded, True is given",
    "data=palindrome data.context=32": r"data.context: 16 is recorded, 32 is given",
    "data=stack": r"data._target_: .*Palindrome is recorded, .*Stack is given",
    "tasks=[arc]": r"tasks: \[\] is recorded, \['arc'\] is given",
    "precison=32": r"Could not override 'precison'",
}


@pytest.mark.parametrize("setting", MEASUREMENTS)
def test_a_measurement_with_other_settings_is_not_taken_for_done(setting: str, tmp_path: Path) -> None:
    """Only a file that is not there is made."""
    line = "evaluate ckpt={run} out={run}/val.json"
    job = job_with(tmp_path, f"then=['{line}']")
    directory = leave_a_run(job)
    measured(job)
    again = (
        "evaluate ckpt={run} data=palindrome data.context=16 data.num_workers=1 data.batch_size=7 out={run}/val.json"
    )
    assert all(job_with(tmp_path, f"then=['{one}']").standing == "done" for one in (line, again))
    with pytest.raises(InputError, match=MEASUREMENTS[setting]) as caught:
        job_with(tmp_path, f"then=['{line} {setting}']")
    if "override" not in MEASUREMENTS[setting]:
        assert f"{directory}/val.json holds a measurement with other settings (" in str(caught.value)
        assert str(caught.value).endswith("move it away, or give another out=; or ask for the recorded settings.")
    (directory / "val.json").unlink()
    assert job_with(tmp_path, f"then=['{line} {setting}']").missing() == ["val.json"]


def test_what_is_no_measurement_is_not_taken_for_one(tmp_path: Path) -> None:
    then = "then=['evaluate ckpt={run} out={run}/val.json']"
    (leave_a_run(job_with(tmp_path, then)) / "val.json").touch()
    with pytest.raises(InputError, match=r"val.json cannot be read as JSON"):
        job_with(tmp_path, then)


def test_a_second_training_with_other_settings_is_not_taken_for_done(tmp_path: Path) -> None:
    def then(steps: int) -> str:
        settings = f"experiment=lm_by_mixer_full {' '.join(TASK)} model=recall trainer.max_steps={steps}"
        return f"then=['train {settings} hydra.run.dir={{run}}/more']"

    run = leave_a_run(job_with(tmp_path, then(10680)))
    shutil.copytree(run, run / "more")
    assert job_with(tmp_path, then(10680)).standing == "done"
    with pytest.raises(InputError, match=r"/more holds a run with other settings \(trainer.max_steps: 10680 is"):
        job_with(tmp_path, then(5))


def test_a_run_of_another_machine_may_have_its_precision_and_paths(tmp_path: Path) -> None:
    text = tmp_path / "here" / "a.txt"

    def job(path: object, *more: str) -> Job:
        return job_of(tmp_path / "out", *TEXT, f"data.paths=[{path}]", *more)

    there = recorded(job("/there/a.txt"))
    trainer = there["trainer"] | {"precision": "bf16-mixed", "accelerator": "gpu"}
    leave_a_run(job("/there/a.txt"), trainer=trainer)
    assert job(text).standing == "done"
    with pytest.raises(InputError, match=r"trainer.precision: bf16-mixed is recorded, 64-true is given"):
        job(text, "trainer.precision=64-true")
    with pytest.raises(InputError, match=r"data.paths: \['/there/a.txt'\] is recorded"):
        job(tmp_path / "here" / "b.txt")


def test_a_path_that_is_here_is_compared(tmp_path: Path) -> None:
    here, other = tmp_path / "here" / "a.txt", tmp_path / "other" / "a.txt"
    here.parent.mkdir()
    here.touch()
    leave_a_run(job_of(tmp_path, *TEXT, f"data.paths=[{here}]"))
    with pytest.raises(InputError, match=r"data.paths: .*here/a.txt'\] is recorded, .*other/a.txt'\] is given"):
        job_of(tmp_path, *TEXT, f"data.paths=[{other}]")


def test_the_model_of_init_from_need_not_be_here(tmp_path: Path) -> None:
    """It decides the groups model and mixer, and the tokenizer, which are in the record alone."""
    words = ("data=files", "data.paths=[a.txt]", "~callbacks.learnt")
    run = leave_a_run(job_of(tmp_path, *TEXT, *words))
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    config["model"]["d_model"], config["mixer"]["name"] = 48, "softmax"
    config["data"] |= {"vocab_size": 999, "tokenizer_path": "/there/one/tokenizer.json"}
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config | {"init_from": "/there/one"}))
    assert job_of(tmp_path, *words, f"init_from={tmp_path}/one").standing == "done"
    with pytest.raises(InputError, match=r"init_from: /there/one is recorded, .*/two is given"):
        job_of(tmp_path, *words, f"init_from={tmp_path}/two")


def test_a_run_of_an_earlier_version_lacks_later_options(tmp_path: Path) -> None:
    """Such an option has the value that was then in effect, unless it is given."""
    record = recorded(job_of(tmp_path))
    model = {name: value for name, value in record["model"].items() if name != "embed_norm"}
    leave_a_run(job_of(tmp_path), model=model)
    assert job_of(tmp_path).standing == "done"
    with pytest.raises(InputError, match=r"model.embed_norm: False is recorded, True is given"):
        job_of(tmp_path, "model.embed_norm=true")


def test_a_stopped_run_may_become_longer_but_not_another(tmp_path: Path) -> None:
    run = leave_a_run(job_of(tmp_path), status="interrupted")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert job_of(tmp_path, "trainer.max_steps=30000").standing == "cut off"
    with pytest.raises(InputError, match="seed: 1 is recorded, 2 is given"):
        job_of(tmp_path, "seed=2")
    shutil.rmtree(run / "checkpoints")  # it would begin again
    assert job_of(tmp_path).begins_again
    with pytest.raises(InputError, match="seed: 1 is recorded, 2 is given"):
        job_of(tmp_path, "seed=2")


def test_a_trained_run_without_a_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = leave_a_run(job_of(tmp_path))
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit) as ending:
        main(["kimi_synthetics", *TASK, "--out", str(tmp_path), "--dry-run"])
    assert ending.value.code == 0
    assert "config.yaml is missing, so its settings are not known" in capsys.readouterr().out


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    leave_a_run(job_of(tmp_path), trainer=3)
    with pytest.raises(InputError, match=r"config.yaml is damaged: it holds a value of a wrong kind"):
        job_of(tmp_path)


WRONG = {
    "trainer.max_steps=abc": "trainer.max_steps must be a whole number of 1 or more, got 'abc'.",
    "trainer.max_steps=0": "trainer.max_steps must be a whole number of 1 or more, got 0.",
    "callbacks.learnt.accuracy=7": "the accuracy of StopWhenLearnt must be above 0 and at most 1, got 7.",
    "+foo=3": "train has no option foo; it has seed, ",
    "data.batch_size=abc": "data.batch_size must be a whole number (at most 2147483647), got 'abc'.",
    "data.context=7": "a palindrome needs an even length, got 7: change data.context or data.val_lengths.",
    "model.num_heads=3": "must",
    "mixer=nope": "mixer=nope: there is no such mixer; there are conv, ",
    "foo=3": "Could not override 'foo'. It has seed, ",
    "data.context=[": "data.context=[ cannot be read (no viable alternative at input '['): close all brackets",
    "~seed": "train needs its option seed: leave ~seed out.",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_found_before_the_first_job_in_the_words_of_the_training(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in TASK if word.partition("=")[0] != setting.partition("=")[0]]
    line = printed_error(["kimi_synthetics", *words, setting, "--out", str(tmp_path / "out"), "--dry-run"], capsys)
    assert WRONG[setting] in line
    run = ["experiment=kimi_synthetics", *words, setting, "hydra.mode=RUN", f"hydra.run.dir={tmp_path}/run"]
    same = error_line("train.py", run, monkeypatch, capsys).removeprefix("error: ")
    assert line.endswith(same)
    assert not (tmp_path / "out").exists()
    assert not HydraConfig.initialized() or HydraConfig.get().job.name  # nothing of a job is left behind


def test_a_setting_is_deleted_in_every_job(tmp_path: Path) -> None:
    job = job_of(tmp_path, "~callbacks.learnt")
    assert job.name == "kimi_synthetics/context=16_data=palindrome_mixer=kda_lr=0.001"
    assert "~callbacks.learnt" in job.overrides
    assert "learnt" not in recorded(job)["callbacks"]
    assert "learnt" in recorded(job_of(tmp_path))["callbacks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slowdown", "-1"], "--slowdown must be a number above 0, as 1.5 for half as long again, got -1."),
        (["--slowdown", "nan"], "--slowdown must be a number above 0, as 1.5 for half as long again, got nan."),
        (["--deadline", "-5"], "--deadline must be more than 20 seconds, got -5: the last 20 s are kept for saving"),
        (["--deadline", "20"], "--deadline must be more than 20 seconds, got 20: the last 20 s are kept for saving"),
        (["--deadline", "nan"], "--deadline must be more than 20 seconds, got nan"),
        (["resume=false"], "resume=false cannot be used here: the same command continues the jobs that were stopped"),
        (["hydra.run.dir=a"], "hydra.run.dir=a cannot be used here: a job has a run directory in --out"),
        (["experiment=ablations"], "experiment=ablations cannot be used here: give the name of the experiment alone."),
        (["estimate.start=-1"], "estimate must have times of 0 or more, and steps_per_s above 0, got {'start': -1"),
        (["estimate=3"], "estimate must have keys of start, then, steps_per_s, gpu_share, got 3."),
        (["estimate.steps_per_s.default=fast"], "estimate.steps_per_s must be names with values"),
        (["+then=['export \"a out=b']"], 'a command of `then` cannot be read (No closing quotation): export "a out=b'),
    ],
)
def test_what_this_command_cannot_use(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in printed_error(["kimi_synthetics", *TASK, *words, "--out", str(tmp_path), "--dry-run"], capsys)


def test_a_file_where_the_runs_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    line = printed_error(["kimi_synthetics", *TASK, "--out", str(tmp_path / "out"), "--dry-run"], capsys)
    assert line.endswith(f"{tmp_path}/out is a file, and a directory is expected. Choose another directory.")


def test_a_run_directory_may_have_a_space(tmp_path: Path) -> None:
    (job,) = jobs_of(["lm_by_mixer_full"], ["mixer=softmax"], tmp_path / "two words")
    assert f"ckpt={job.directory}" in job.then[0]
