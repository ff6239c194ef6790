"""A run is what its data are, not where they lie: other data are refused on resuming and named on evaluating."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from lkda.commands.command_line import errors
from lkda.commands.evaluate import evaluate
from lkda.commands.train import train
from lkda.ops import resolve_backend
from lkda.training.task import LanguageModelTask
from tests.commands.small import composed, rows

SETTINGS = ("debug=fast", "data=files", "trainer=cpu", "sample.max_new_tokens=0", "trainer.max_steps=2")
LONGER = ("trainer.max_steps=4",)


def run(directory: Path, data: Path | str, *overrides: str) -> dict[str, Any]:
    return train(composed("train", *SETTINGS, f"data.paths=[{data}]", *overrides), directory)


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `texts` and a `run` of two steps on them."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(corpus, home / "texts")
    run(home / "run", home / "texts")
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """The same at a path of its own, which a test may change."""
    shutil.copytree(finished, tmp_path / "home")
    recorded = tmp_path / "home" / "run" / "config.yaml"
    recorded.write_text(recorded.read_text().replace(str(finished), str(tmp_path / "home")))
    return tmp_path / "home"


def change(texts: Path) -> None:
    for path in texts.glob("*.txt"):
        path.write_text(path.read_text().replace("senate", "garden").replace("young", "old") * 2)


def test_checkpoint_and_summary_have_the_fingerprint(finished: Path) -> None:
    summary = json.loads((finished / "run" / "summary.json").read_text())
    checkpoint = torch.load(finished / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert summary["fingerprint"] == checkpoint["lkda"]["run"]["fingerprint"]
    assert set(summary["fingerprint"]) == {"train", "validation", "test", "tokenizer"}
    assert all(len(digest) == 64 for digest in summary["fingerprint"].values())


def test_other_text_does_not_resume(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(home / "texts")
    before = files(home / "run")
    # Before time is spent on it: the tokenizer is not trained.
    monkeypatch.setattr("lkda.data.text.tokenize.train_tokenizer", lambda *_: pytest.fail("trained a tokenizer"))
    with pytest.raises(
        ValueError,
        match=r"resumed: the training data, the validation data and the test data \(.*texts\) must be the same",
    ):
        run(home / "run", home / "texts", *LONGER, "resume=true")
    assert files(home / "run") == before


def test_another_tokenizer_does_not_resume(home: Path, tmp_path: Path) -> None:
    given = tmp_path / "tokenizer.json"
    shutil.copy(home / "run" / "tokenizer.json", given)
    run(tmp_path / "other", home / "texts", f"data.tokenizer_path={given}")
    vocabulary = json.loads(given.read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-1]
    given.write_text(json.dumps(vocabulary))
    before = files(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot be resumed: the tokenizer \(.*tokenizer.json\) must be the same"):
        run(tmp_path / "other", home / "texts", f"data.tokenizer_path={given}", *LONGER, "resume=true")
    assert files(tmp_path / "other") == before


def test_the_same_text_elsewhere_resumes(home: Path) -> None:
    (home / "texts").rename(home / "moved")
    assert run(home / "run", home / "moved", *LONGER, "resume=true")["steps"] == 4
    assert OmegaConf.load(home / "run" / "config.yaml").data.paths == [str(home / "moved")]


def without_fingerprint(run_directory: Path) -> None:
    """As runs were recorded before they had one."""
    for path in (run_directory / "checkpoints").glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["lkda"]["run"]["fingerprint"]
        path.unlink()
        torch.save(checkpoint, path)


@pytest.mark.slow
def test_a_run_of_before_fingerprints_resumes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_fingerprint(home / "run")
    recorded = home / "run" / "config.yaml"
    monkeypatch.chdir(home)
    recorded.write_text(recorded.read_text().replace(f"{home}/texts", "texts"))  # nor were paths absolute
    assert run(home / "run", "texts", *LONGER, "resume=true")["steps"] == 4
    assert evaluate(composed("evaluate", f"ckpt={home}/run", "accelerator=cpu", "max_batches=1"))["loss"] > 0


@pytest.mark.slow
def test_without_a_fingerprint_the_place_must_be_the_same_and_the_tokenizer_too(home: Path) -> None:
    without_fingerprint(home / "run")
    shutil.copytree(home / "texts", home / "moved")
    with pytest.raises(ValueError, match=r"other settings \(data.paths: .*texts.* is recorded, .*moved.* is given\)"):
        run(home / "run", home / "moved", *LONGER, "resume=true")
    change(home / "texts")
    with pytest.raises(ValueError, match="cannot be resumed: the tokenizer "):
        run(home / "run", home / "texts", *LONGER, "resume=true")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("override", "differs"),
    [
        ("trainer.precision=bf16-mixed", "trainer.precision: 32-true is recorded, bf16-mixed is given"),
        ("data.batch_size=4", "data.batch_size: 2 is recorded, 4 is given"),
        ("mixer=softmax", "mixer.name: kda is recorded, softmax is given"),
        ("scheduler=constant", "scheduler.name: wsd is recorded, constant is given"),
        ("seed=5", "seed: 1 is recorded, 5 is given"),
        ("trainer.gradient_clip_val=2.0", "trainer.gradient_clip_val: 1.0 is recorded, 2.0 is given"),
    ],
)
def test_what_changes_a_run_does_not_resume(home: Path, override: str, differs: str) -> None:
    with pytest.raises(ValueError, match=differs):
        run(home / "run", home / "texts", *LONGER, "resume=true", override)


def test_what_does_not_change_a_run_resumes(home: Path, tmp_path: Path) -> None:
    free = ("trainer.log_every_n_steps=2", "checkpoint.keep=1", "checkpoint.every_n_steps=1", "sample.temperature=0.5")
    places = (f"data.cache_dir={tmp_path}/cache", "backend=chunk")
    assert run(home / "run", home / "texts", *LONGER, *free, *places, "resume=true")["steps"] == 4


def test_evaluating_other_data_says_so(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (f"ckpt={home}/run", "accelerator=cpu", "max_batches=1")
    evaluate(composed("evaluate", *words, f"out={tmp_path}/same.json"))
    assert "note:" not in capsys.readouterr().out
    change(home / "texts")
    evaluate(composed("evaluate", *words, f"out={tmp_path}/new/folder/other.json"))
    printed = capsys.readouterr().out
    assert printed.startswith(
        "note: the training data, the validation data and the test data of files are not those of the run"
    )
    same, other = (json.loads((tmp_path / name).read_text()) for name in ("same.json", "new/folder/other.json"))
    assert same["differs_from_the_run"] == []
    assert other["differs_from_the_run"] == ["the training data", "the validation data", "the test data"]
    assert same["fingerprint"] == same["run"]["fingerprint"] != other["fingerprint"]
    kda = resolve_backend("kda", "auto", device="cpu", head_dim=16, dtype=torch.float32)
    assert (same["precision"], same["backend"], same["device"]) == ("float32", {"kda": kda}, "cpu")


@pytest.mark.slow
def test_relative_paths_mean_the_same_from_anywhere(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here [1]"  # of which a pattern must not make one of its own
    shutil.copytree(corpus, here / "texts")
    monkeypatch.chdir(here)
    run(tmp_path / "run", "texts/*.txt")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    shutil.copytree(corpus, elsewhere / "texts")
    change(elsewhere / "texts")
    monkeypatch.chdir(elsewhere)
    words = (f"ckpt={tmp_path}/run", "accelerator=cpu", "max_batches=1")
    evaluate(composed("evaluate", *words))
    assert "note:" not in capsys.readouterr().out
    shutil.rmtree(here)
    with pytest.raises(ValueError, match=r"data path .*texts/\*.txt matches no file"):
        evaluate(composed("evaluate", *words))


def test_a_synthetic_task_is_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("debug=fast", "data=palindrome", "trainer=cpu", "trainer.max_steps=2", "data.val_examples=4")
    train(composed("train", *task), tmp_path / "run")
    words = (f"ckpt={tmp_path}/run", "accelerator=cpu", "data=palindrome", "data.context=32", "data.val_examples=4")
    evaluate(composed("evaluate", *words, "seed=7"))
    assert "note:" not in capsys.readouterr().out
    evaluate(composed("evaluate", *words, "data.val_lengths=[16]"))
    assert "note: the validation data of palindrome are not those" in capsys.readouterr().out


def test_a_run_that_fails_before_its_first_step_leaves_its_directory_free(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee the documentation.")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTask, "training_step", too_large)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run(tmp_path / "new", home / "texts")
    assert not (tmp_path / "new").exists()
    printed = errors.in_words(caught.value)
    assert printed is not None
    assert printed.startswith("out of memory (CUDA out of memory.")
    assert "lower data.batch_size" in printed
    assert "\n" not in printed
    # As a process leaves it that is killed there.
    (tmp_path / "new").mkdir()
    shutil.copy(home / "run" / "config.yaml", tmp_path / "new")
    (tmp_path / "new" / "metrics.csv").write_text("step,tokens\n")
    assert run(tmp_path / "new", home / "texts", "model.d_model=16")["steps"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "port: 8080\n", r"config.yaml is not a configuration of lkda"),
        ("config.yaml", "{", r"config.yaml cannot be read"),
        ("metrics.csv", "name,value\na,1\n", "holds a run whose config.yaml is missing"),
    ],
)
def test_files_of_others_are_not_written_over(
    home: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / name).write_text(content)
    (tmp_path / "work" / "notes.txt").write_text("mine")
    before = files(tmp_path / "work")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "work", home / "texts")
    assert files(tmp_path / "work") == before


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> list[dict[str, str]]:
    run(finished / "four", finished / "texts", *LONGER)
    return rows(finished / "four")


FILES = ["config.yaml", "tokenizer.json", "metrics.csv", "step_0000002.ckpt", "step_0000004.ckpt", "summary.json"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == FILES[-1] else pytest.mark.slow) for name in FILES]
)
def test_a_full_disk_damages_nothing(
    home: Path, tmp_path: Path, undisturbed: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whichever file it is that no longer fits, the run goes on once there is room, as if nothing had been."""
    fsync: Callable[[int], None] = os.fsync

    def full(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            run(tmp_path / "run", home / "texts", *LONGER)
    assert name in caught.value.filename
    assert errors.in_words(caught.value) == f"{caught.value.filename}: No space left on device."
    assert not list(tmp_path.rglob("*.tmp"))
    if (tmp_path / "run" / "metrics.csv").exists():
        left = rows(tmp_path / "run")
        assert left == undisturbed[: len(left)]
    assert run(tmp_path / "run", home / "texts", *LONGER, "resume=true")["status"] == "finished"
    assert rows(tmp_path / "run") == undisturbed
