"""`lkda train` and the others, and the commands that a run prints."""

from __future__ import annotations

import gc
import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import lkda
from lkda.checks import PlainWarning
from lkda.commands import entry_point
from lkda.commands.command_line import errors
from lkda.commands.compare import _find
from lkda.commands.entry_point import COMMANDS, _imported, main
from lkda.commands.run.console import resume_command
from lkda.commands.run.run_directory import RunDirectory
from lkda.report.read.runs import read_run
from tests.commands.small import ROOT, small_run
from tests.generation.test_generate import byte_tokenizer, model_of


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Runs `lkda WORDS`, as from a shell. Returns its exit code."""
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lkda", *words])
    try:
        main()
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def test_every_script_is_a_command() -> None:
    assert {name.replace("-", "_") for name in COMMANDS} == {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_it_lists_the_commands(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train --mixer kda", "--mixer is not an option: a setting has no dashes, as in mixer=kda. lkda train --help"),
        ("train --max-steps=5", "--max-steps=5 is not an option: a setting has no dashes, as in max_steps=5. "),
        ("train mixer kda", "'mixer' is not key=value. Give each setting with its name, as in seed=1."),
        ("compare runs/a runs/b", "'runs/a' is not key=value. Give the runs as runs='outputs/*' or runs='[runs/one,"),
        ("evaluate runs/a", "'runs/a' is not key=value. Give a run as ckpt=runs/one."),
        (
            "train mixer=kda,softmax",
            "mixer=kda,softmax has several values: add -m in front of it to train with each of ",
        ),
        (
            "train data.paths=[texts]",
            "Could not override 'data.paths'. It is a setting of data=completions, data=files, data=tokens: choose",
        ),
    ],
)
def test_a_word_that_is_no_setting_is_one_line(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/somewhere/bin/lkda")
    assert typed(monkeypatch, *words.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {expected}"), printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "--cfg job",
        "-c job data=files data.paths=[a]",
        "--hydra-help",
        "--resolve --cfg job",
        "seed=2 --cfg job ~experiment data=sotu",
    ],
)
def test_flags_of_hydra_are_no_settings(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "train", *words.split()) == 0
    assert capsys.readouterr().err == ""


def test_an_unknown_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "trian") == 2
    assert capsys.readouterr().err.startswith("error: lkda has no command 'trian'. Did you mean train? It has train,")


def test_what_the_output_cannot_encode_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lkda.export(model_of(["kda"]), byte_tokenizer(), tmp_path / "exported")
    (tmp_path / "prompt.txt").write_text("naïve", encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    words = [f"ckpt={tmp_path}/exported", f"prompt_file={tmp_path}/prompt.txt", "max_new_tokens=0", "accelerator=cpu"]
    assert typed(monkeypatch, "generate", *words) == 0
    assert printed.getvalue() == b"na?ve\n"


# Hydra takes seconds to list the groups; tests/scripts/test_help.py reads the help of every script.
HELP = [pytest.param(name, marks=pytest.mark.slow if name == "prepare-data" else pytest.mark.long) for name in COMMANDS]


@pytest.mark.parametrize("name", HELP)
def test_the_help_of_a_command_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, name, "--help") == 0
    printed = capsys.readouterr().out
    assert f"lkda {name} " in printed
    assert "scripts/" not in printed


def test_the_flags_of_hydra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "train", "--cfg", "job", "seed=7") == 0
    assert capsys.readouterr().out.startswith("seed: 7\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate"], "error: ckpt is required: give ckpt=..., for example ckpt=runs/one, the directory of a run.\n"),
        (["evaluate", "ckpt=/nowhere/a=b"], "error: there is no checkpoint at /nowhere/a=b. Give the directory of a"),
        (["export", "ckpt=[a]", "out=x"], "error: there is no checkpoint at [a]. Give the directory of a run, a"),
        (["train", "hydra.run.dir=/proc/lkda"], "error: cannot create the output directory /proc/lkda: "),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, *words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1


def test_errors_name_the_door_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("debug=fast", "data=prose", f"data.directory={tmp_path}", "trainer=cpu", f"hydra.run.dir={tmp_path}/run")
    assert typed(monkeypatch, "train", *small) == 2
    assert "make it with /somewhere/bin/lkda prepare-data." in capsys.readouterr().err


def test_runs_that_begin_at_the_same_time_have_a_directory_each(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The name is that of the century instead of the second. One run trains still, and one has ended."""
    monkeypatch.chdir(tmp_path)
    century = Path("20_kda")
    words = ("train", *small_run(corpus), "trainer.max_steps=1", "hydra.run.dir=${now:%C}_${mixer.name}")
    other = RunDirectory(century)
    assert typed(monkeypatch, *words) == 0
    other.release()
    assert "run directory 20_kda_2\n" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    for _ in range(2):
        assert typed(monkeypatch, *words, "trainer.max_steps=2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20_kda", "20_kda_2", "20_kda_3"]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize("more", [["seed=1"], ["seed=1", "resume=true", "optimizer.lr=0.5"]], ids=" ".join)
def test_a_sweep_does_not_mark_another_run_as_failed(
    more: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "-m", *small_run(corpus), "sample.max_new_tokens=0", f"hydra.sweep.dir={tmp_path}"]
    assert typed(monkeypatch, *words, "seed=1") == 0
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert typed(monkeypatch, *words, *more) != 0
    assert f"error: {run} " in capsys.readouterr().err
    assert not (run / "failure.txt").exists()
    assert read_run(run).summary["status"] == "finished"


@pytest.mark.slow
def test_a_sweep_knows_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def note(config: DictConfig, directory: str) -> dict[str, float]:
        hydra = HydraConfig.get()
        (run := RunDirectory(directory)).release()
        resume = shlex.split(resume_command(run))
        jobs.append((hydra.job.name, hydra.mode, list(hydra.overrides.task), Path(directory).name, resume[1:]))
        return {}

    monkeypatch.setattr("lkda.commands.train.train", note)
    words = ("mixer=kda,softmax", "sample.prompt=it's", f"hydra.sweep.dir={tmp_path}")
    assert typed(monkeypatch, "train", "-m", *words) == 0
    names = ["0_kda_tiny_seed1", "1_softmax_tiny_seed1"]
    for job, name, mixer in zip(jobs, names, ("kda", "softmax"), strict=True):
        given = [f"mixer={mixer}", r"sample.prompt='it\'s'"]
        resume = ["train", *given, "hydra.mode=RUN", f"hydra.run.dir={tmp_path}/{name}", "resume=true"]
        assert job == ("train", RunMode.MULTIRUN, given, name, resume)


@pytest.mark.long
def test_a_job_of_an_experiment_resumes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment asks for a sweep; the command that is printed for one of its jobs does not."""
    jobs: list[tuple[str, RunMode, list[str]]] = []

    def note(config: DictConfig, directory: str) -> dict[str, float]:
        (run := RunDirectory(directory)).release()
        jobs.append((directory, HydraConfig.get().mode, shlex.split(resume_command(run))[1:]))
        return {}

    monkeypatch.setattr("lkda.commands.train.train", note)
    assert typed(monkeypatch, "train", "experiment=mixers_on_sotu", f"hydra.sweep.dir={tmp_path}") == 0
    directory, mode, resume = jobs[1]
    assert mode == RunMode.MULTIRUN
    jobs.clear()
    assert typed(monkeypatch, *resume) == 0
    assert [job[:2] for job in jobs] == [(directory, RunMode.RUN)]


def test_an_experiment_that_was_run_once_is_printed_as_one_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("experiment=mixers_on_sotu", *small_run(corpus), "hydra.mode=RUN", "hydra.run.dir=run")
    assert typed(monkeypatch, "train", *words) == 0
    (_, printed) = capsys.readouterr().out.split("\nnext:\n")
    again = shlex.split(printed.splitlines()[2])[1:]
    assert again == ["train", *words[:-1], "mixer=softmax", "hydra.run.dir=run_softmax"]


def test_the_other_mixer_has_a_convolution_first_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two layers, softmax alone does not learn recall."""
    words = ("debug=fast", "data=mqar", "model=recall", "trainer=cpu", "mixer=conv_kda")
    assert typed(monkeypatch, "train", *words, f"hydra.run.dir={tmp_path}/run") == 0
    assert " mixer=conv_softmax " in capsys.readouterr().out.split("\nnext:\n")[1]


@pytest.mark.slow
def test_printed_commands_can_be_pasted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run in a directory with everything that a shell or Hydra minds."""
    nasty = tmp_path / 'it\'s [a] = $b, {c}; "é"\t:x:' / "run 1"
    monkeypatch.chdir(tmp_path)
    words = small_run(corpus, r"sample.prompt=\${x}")  # the text ${x}
    assert typed(monkeypatch, "train", *words, f"hydra.run.dir={nasty}") == 0
    (_, printed) = capsys.readouterr().out.split("\nnext:\n")
    found = [shlex.split(line) for line in printed.splitlines()]
    names = ["generate", "evaluate", "train", "compare"]
    assert [words[:2] for words in found] == [["/somewhere/bin/lkda", name] for name in names]
    generate, evaluate, train, compare = (words[1:] for words in found)
    assert typed(monkeypatch, *generate, "max_new_tokens=2") == 0
    assert capsys.readouterr().out.startswith("The people")
    assert typed(monkeypatch, *generate[:-1], "prompt=???", "max_new_tokens=0") == 0
    assert capsys.readouterr().out == "???\n"
    assert typed(monkeypatch, *evaluate, "accelerator=cpu") == 0
    assert train[:-1] == ["train", *words, "mixer=softmax"]  # the same data and model
    beside: list[str] = []
    monkeypatch.setattr("lkda.commands.train.train", lambda config, directory: beside.append(directory) or {})
    assert typed(monkeypatch, *train) == 0
    assert [Path(directory) for directory in beside] == [nasty.with_name("run 1_softmax")]
    asked = [DictConfig({})]
    monkeypatch.setattr("lkda.commands.compare.compare", asked.append)
    assert typed(monkeypatch, *compare) == 0
    assert _find(asked[-1].runs, option="runs", what="run directories") == [
        path.relative_to(tmp_path) for path in (nasty, nasty.with_name("run 1_softmax"))
    ]  # both runs


def test_the_next_training_leaves_out_what_belongs_to_the_mixer(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed command can be pasted. A model of init_from has its mixer: no other is advised."""
    monkeypatch.chdir(tmp_path)
    words = [*small_run(corpus), "trainer.max_steps=1", "optimizer.lr=1e-3", "sample.max_new_tokens=0"]
    of_mixer = ["backend=recurrent", "mixer.num_heads=1", "mixer.kda.gate=head"]
    assert typed(monkeypatch, "train", *words, *of_mixer, "hydra.run.dir=kda") == 0
    (_, printed) = capsys.readouterr().out.split("\nnext:\n")
    next_training = shlex.split(printed.splitlines()[2])[1:]
    assert next_training == ["train", *words, "mixer.num_heads=1", "mixer=softmax", "hydra.run.dir=softmax"]
    assert typed(monkeypatch, *next_training) == 0
    assert typed(monkeypatch, "export", "ckpt=softmax", "out=exported") == 0
    capsys.readouterr()
    again = ["init_from=exported", "rope_base=500000"]
    assert typed(monkeypatch, "train", *words, *again, "hydra.run.dir=again") == 0
    (_, printed) = capsys.readouterr().out.split("\nnext:\n")
    assert [shlex.split(line)[1] for line in printed.splitlines()] == ["generate", "evaluate", "compare"]


@contextmanager
def closed_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output into a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        yield


@pytest.mark.parametrize(
    "words", [pytest.param(["train", "--help"], marks=pytest.mark.long), ["train", "--cfg", "job"]]
)
def test_a_reader_that_leaves_ends_a_command_quietly(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with closed_pipe(monkeypatch):
        assert typed(monkeypatch, *words) == 1
        sys.stdout.flush()  # as the interpreter does at its end: nothing is left that could fail
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_a_reader_that_leaves_ends_generating_quietly(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "train", *small_run(corpus), f"hydra.run.dir={tmp_path}/run") == 0
    capfd.readouterr()
    for command in ("generate", "evaluate"):
        words = ["prompt=a", "max_new_tokens=50"] if command == "generate" else []
        with closed_pipe(monkeypatch):
            assert typed(monkeypatch, command, f"ckpt={tmp_path}/run", "accelerator=cpu", *words) == 1
            sys.stdout.flush()
        assert capfd.readouterr().err == ""


def test_a_full_disk_below_standard_output_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "wb", buffering=0) as full, io.TextIOWrapper(full, write_through=True) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert typed(monkeypatch, "train", "--cfg", "job") == 2
        monkeypatch.undo()
    assert capfd.readouterr().err == "error: cannot print: No space left on device.\n"


def test_imports_are_not_searched_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import gc\ncollects = gc.isenabled()\nkept = [[] for _ in range(1000)]\n"
    (tmp_path / "many_objects.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    module = _imported("many_objects")
    assert not module.collects
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + 1000
    frozen, left_by_a_job = gc.get_freeze_count(), [[] for _ in range(1000)]
    assert _imported("many_objects") is module
    assert gc.get_freeze_count() < frozen + len(left_by_a_job), "what a job of a sweep leaves behind must be found"
    del sys.modules["many_objects"]


def test_a_started_process_takes_no_traceback_for_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command sets HYDRA_FULL_ERROR for Hydra, and the processes of a run inherit it."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert not errors.asks_for_tracebacks()
    with errors.readable_errors():
        assert os.environ["HYDRA_FULL_ERROR"] == "1"
    assert not errors.asks_for_tracebacks()
    monkeypatch.delenv("LKDA_SETS_HYDRA_FULL_ERROR")
    assert errors.asks_for_tracebacks()


def test_a_warning_for_the_user_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[str] = []

    def export(config: DictConfig) -> None:
        for kind in (PlainWarning, RuntimeWarning):
            shown.append(warnings.formatwarning(kind("the file\nis broken"), kind, __file__, 1, "warn()"))

    monkeypatch.setattr(entry_point, "_imported", lambda name: SimpleNamespace(export=export))
    assert typed(monkeypatch, "export", "ckpt=a", f"out={tmp_path / 'out'}", f"hydra.run.dir={tmp_path}") == 0
    assert shown[0] == "warning: the file is broken\n"
    assert "RuntimeWarning: the file" in shown[1]
    assert "warn()" in shown[1]
