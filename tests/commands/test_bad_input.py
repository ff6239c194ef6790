"""What each mistake is answered with: one line on stderr, exit code 2, nothing lost. Of the settings of a training:
test_bad_training_input.py."""

import re
import runpy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import lkda
from lkda.commands.command_line.errors import in_words
from lkda.ops.runtime import cubin_cache
from tests.commands.bad_places import Places
from tests.commands.error_line import error_line
from tests.commands.small import ROOT, small_run

# On the command line a value with commas, spaces or dots in it is quoted as any shell would pass it.
CHECKPOINT = [
    ("", r"ckpt is required: give ckpt=..., for example ckpt=runs/one, the directory of a run.$"),
    ("ckpt={tmp}/missing.ckpt", r"there is no checkpoint at .*missing.ckpt. Give the directory of a run, a file in"),
    ("ckpt={tmp}/short.txt", r"short.txt is truncated or not a checkpoint \(.*\). Give the directory of a run"),
    (
        "ckpt={tmp}/gguf",
        r"gguf holds a GGUF file, which is for llama.cpp and cannot be loaded .* format=lkda or format=hf",
    ),
    ("ckpt={tmp}/truncated.ckpt", r"truncated.ckpt is truncated or not a checkpoint"),
    ("ckpt={tmp}/foreign.ckpt", r"foreign.ckpt is not a checkpoint of lkda"),
    ("ckpt={tmp}/other.ckpt", r"other.ckpt holds the weights of another model: blocks.0.* is .*, expected "),
    ("ckpt={tmp}/no_last", r"no checkpoint at .*last.ckpt; beside it there is best.ckpt: give one as ckpt="),
    (
        "ckpt={tmp}",
        r"no checkpoint at .*checkpoints/last.ckpt, and .* is no exported directory .* config.json. Give the directory",
    ),
]

GENERATE = [
    ("ckpt={run} prompt=a temperature=-1", r"temperature must be a number of 0 or more \(0: .*\), got -1\.$"),
    (
        "ckpt={run} prompt=a top_p=0",
        r"error: generate: top_p must be above 0 and at most 1 \(1: all tokens\), got 0\.$",
    ),
    ("ckpt={run} prompt=a top_p=1.5", r"error: generate: top_p must be above 0 and at most 1 .*, got 1.5\.$"),
    ("ckpt={run} prompt=a min_p=2", r"error: generate: min_p must be from 0 to 1 \(0: all tokens\), got 2\.$"),
    ("ckpt={run} prompt=a max_new_tokens=-1", r"max_new_tokens must be a whole number of 0 or more, got -1"),
    ("ckpt={run} prompt=a prompt_file={tmp}/short.txt", r"give either prompt=... or prompt_file=..., not both"),
    (
        "ckpt={run} prompt_file={tmp}/missing.txt",
        r"cannot read prompt_file .*missing.txt: No such file .* Give a text file",
    ),
    ("ckpt={run} prompt_file={tmp}", r"cannot read prompt_file .*: Is a directory. Give a text file that exists"),
    ("ckpt={run} prompt_file={tmp}/latin1.txt", r"the prompt in .*latin1.txt is not UTF-8"),
    ("ckpt={run} prompt=a seed=x", r"seed must be a whole number of 0 or more, got 'x'"),
    ("ckpt={run} prompt=a seed=99999999999999999999", r"seed must be at most 4294967295"),
    ("ckpt={run} prompt=a temperature=warm", r"temperature must be a number of 0 or more \(0: .*\), got 'warm'"),
    ("ckpt={run} prompt=a ignore_eos=perhaps", r"ignore_eos must be true or false, got 'perhaps'"),
    ("ckpt={run} prompt=two words", r"'words' is not key=value. A prompt of several words must be in quotes"),
    ("ckpt={run} prompt=\udcff", r"prompt is not UTF-8"),
    ("ckpt={run} prompt=a temperature=0 top_p=0.5", r"top_p has no effect beside temperature=0, .*; leave it out"),
    ("ckpt={run} prompt=a max_new_tokens=0 ignore_eos=true", r"ignore_eos has no effect beside max_new_tokens=0"),
    ("ckpt={run} prompt=a backend=cuda", r"not on a CUDA device"),
    ("ckpt={run} prompt=a accelerator=gpu", r"a GPU was asked for and torch sees no CUDA device"),
]

EXPORT = [
    ("ckpt={run} out={tmp}/exported format=ggufff", r"format must be one of .*lkda.*, got 'ggufff'"),
    ("ckpt={run} out={tmp}", r"the directory .* is not empty. Choose another, or empty it"),
    ("ckpt={run} out={tmp}/short.txt/x", r"cannot write the directory .*short.txt/x: Not a directory"),
]

EVALUATE = [
    ("ckpt={tmp}/alone.ckpt", r"is in no run directory that records what data it was trained on: give data=..."),
    ("ckpt={run} data=files data.paths=[{tmp}/latin1.txt]", r"latin1.txt is not UTF-8"),
    ("ckpt={run} out={tmp}", r"out=.* is a directory: give the name of a file in it"),
    (
        "ckpt={run} out={tmp}/short.txt/result.json",
        r"out=.*result.json cannot be written: .*short.txt: Not a directory",
    ),
    ("ckpt={run} out=/proc/result.json", r"out=/proc/result.json cannot be written: /proc: "),
    ("ckpt={run} +colour=red", r"evaluate has no option colour; it has ckpt, seed, .*, data"),
    ("ckpt=''", r"ckpt must be a path .*, got ''"),
    ("ckpt=5", r"there is no checkpoint at 5"),
    ("ckpt={run} limit=5", r"limit has an effect only with tasks=\[...\]: name some tasks, or leave it out"),
    ("ckpt={run} tasks_path={tmp}", r"tasks_path has an effect only with tasks="),
    (
        "ckpt={run} tasks=[a] max_batches=2",
        r"max_batches has no effect with tasks=\[...\], which are measured in place of data",
    ),
    ("ckpt={run} tasks=[a] stepwise=true", r"stepwise has no effect with tasks"),
    ("ckpt={run} tasks=[a] data=sotu", r"data has no effect with tasks=.*: leave out one of the two"),
    ("ckpt={run} tasks=[a] limit=0", r"limit must be a whole number of 1 or more, got 0"),
    ("ckpt={run} tasks=a", r"tasks must be a list, each entry text, got 'a'"),
    ("ckpt={run} stepwise=maybe", r"stepwise must be true or false, got 'maybe'"),
    (
        "ckpt={run} stepwise=true backend=chunk",
        r"backend=chunk is for whole sequences, but stepwise=true ",
    ),
    ("ckpt={run} seed=2", r"seed has no effect in an evaluation, which samples nothing; leave it out"),
    ("ckpt={run} data=sotu data.num_workers=2", r"data.num_workers has no effect in an evaluation: it concerns"),
    ("ckpt={run} data.batch_size=1", r"data.batch_size needs data=CHOICE beside it"),
    ("ckpt={run} +data.batch_size=1", r"data.batch_size needs data=CHOICE beside it"),
    ("ckpt={run} seed=x", r"seed must be a whole number"),
    (
        "ckpt={run} data=sotu data.tokenizer_path={tmp}/short.txt",
        r"the model's own tokenizer: leave out data.tokenizer",
    ),
    ("ckpt={run} data=sotu data.vocab_size=500", r"the model's own tokenizer: leave out data.vocab_size=500"),
    ("ckpt={run} data=random", r"data=random cannot be measured: its tokens are independent .*Choose other data, or"),
    ("ckpt={run} data=palindrome data.val_lengths=[64,64]", r"data.val_lengths has 64 twice: leave one of them out"),
    (
        "ckpt={run} data=palindrome data.val_lengths=[2000000000] data.val_examples=4096 data.batch_size=4096",
        r"of 2,000,000,000 tokens, 4096 at a time, need more than [\d,]+ GiB of memory, .*: lower data.val_lengths or",
    ),
    ("ckpt={run} data=palindrome data.context=x", r"data.context must be a whole number .*, got 'x'"),
    ("ckpt={run} data=sotu data.source=files", r"data.paths is empty"),
]

OTHERS = [
    ("compare.py", "", r"runs is required: give runs=..., for example runs='outputs/\*', which are the directories"),
    ("export.py", "ckpt={run}", r"out is required: give out=..., for example out=exported/one.$"),
    (
        "train.py",
        "data=files",
        r"data.paths is required: give data.paths=..., for example data.paths='\[texts/\*.txt\]'.$",
    ),
    ("compare.py", "runs=[]", r"runs is empty: give run directories"),
    ("compare.py", "runs=5", r"runs=5 matches nothing"),
    (
        "compare.py",
        "runs={run} out={tmp}/short.txt",
        r"out=.*short.txt: .*short.txt is a file, and a directory is expected",
    ),
    ("compare.py", "runs={run} out={tmp}/short.txt/x", r"out=.*/x: .*short.txt is a file, and a directory is expected"),
    (
        "compare.py",
        "runs={run} out={tmp}/new step=4000",
        r"none of the runs has a validation at step 4000 \(.*run: there are [0-9, ]+\); give a step at which all",
    ),
    ("compare.py", "runs={run} out={tmp}/new step=x", r"step must be a whole number .* or null, got 'x'"),
    ("compare.py", "runs={run} out={tmp}/new exclusive_device=maybe", r"exclusive_device must be true or false, got"),
    ("compare.py", "runs={run} out={tmp}/new title=null", r"title must be text, got None"),
    ("prepare_data.py", "out={tmp}/new sources=[]", r"sources is empty; give some of sotu, "),
    ("prepare_data.py", "out={tmp}/new sources=sotu", r"sources must be a list, each entry text or null, got 'sotu'"),
    ("prepare_data.py", "out={tmp}/new vocab_size=x", r"vocab_size must be a whole number"),
    ("prepare_data.py", "out={tmp}/new vocab_size=3", r"error: vocab_size must be at least 257 "),
    ("prepare_data.py", "out={tmp}/new paths=[{tmp}/a.txt] vocab_size=3", r"error: vocab_size must be at least 257 "),
    ("prepare_data.py", "out={tmp}/folder", r"folder exists already: give another out, or remove it"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        *(("evaluate.py", *row) for row in CHECKPOINT),
        *((script, *row) for script in ("generate.py", "export.py") for row in CHECKPOINT[:3]),
    ],
)
def test_checkpoints(
    script: str,
    arguments: str,
    expected: str,
    places: Places,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    extra = {"generate.py": ["prompt=a"], "export.py": [f"out={tmp_path}/x"], "evaluate.py": []}[script]
    given = arguments.format(tmp=places.tmp, run=places.run).split()
    printed = error_line(script, [*given, *extra], monkeypatch, capsys)
    assert re.search(expected, printed), printed


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        *(("generate.py", *row) for row in GENERATE),
        *(("export.py", *row) for row in EXPORT),
        *(("evaluate.py", *row) for row in EVALUATE),
        *OTHERS,
    ],
)
def test_other_scripts(
    script: str,
    arguments: str,
    expected: str,
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(places.tmp.rglob("*"))
    printed = error_line(script, arguments.format(tmp=places.tmp, run=places.run).split(), monkeypatch, capsys)
    assert re.search(expected, printed), printed
    assert sorted(places.tmp.rglob("*")) == before


def test_a_bug_keeps_its_traceback(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A ValueError inside the package, but none that it raises itself.
    source = "def broken(*args, **kwargs):\n    int('not a number')"
    made: dict[str, object] = {}
    exec(compile(source, str(Path(lkda.__file__).parent / "commands" / "made_up.py"), "exec"), made)
    monkeypatch.setattr("lkda.commands.train.summarize", made["broken"])
    monkeypatch.setattr(sys, "argv", ["train.py", *small_run(corpus), f"hydra.run.dir={tmp_path}/run"])
    with pytest.raises(ValueError, match="invalid literal for int"):
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")


def test_divergence_stops_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that blows the loss up: the step and the last good checkpoint are named, and that one is good."""
    rate = ("optimizer.lr=1e30", "trainer.gradient_clip_val=null", "checkpoint.every_n_steps=1")
    settings = small_run(corpus, *rate, "trainer.max_steps=40")
    monkeypatch.setattr(
        sys, "argv", ["train.py", *settings, "scheduler.warmup_steps=30", f"hydra.run.dir={tmp_path}/run"]
    )
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    assert ending.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(r"error: .* became NaN or infinite at step \d+\. Last good checkpoint: ", printed), printed
    assert '"status": "diverged"' in (tmp_path / "run" / "summary.json").read_text()
    saved = list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert any(str(path) in printed for path in saved), printed
    for path in saved:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_no_home_directory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LKDA_CACHE")
    monkeypatch.setattr(Path, "home", unknown)
    printed = error_line("train.py", [*small_run(corpus), f"hydra.run.dir={tmp_path}/run"], monkeypatch, capsys)
    assert "there is no home directory for the cache: set LKDA_CACHE to a directory" in printed
    with pytest.raises(ValueError, match="no home directory for the cache: set LKDA_CACHE"):
        cubin_cache.directory()
    assert not (tmp_path / "run").exists()


class OfLightning:
    """Errors as they come out of Lightning, Hydra and torch, none of which this package raises itself."""

    @staticmethod
    def misconfiguration() -> None:
        L.Trainer(limit_val_batches=1.5, logger=False, barebones=True)

    @staticmethod
    def no_such_class() -> None:
        instantiate({"_target_": "lightning.Nothing"})

    @staticmethod
    def no_such_option() -> None:
        instantiate({"_target_": "lightning.Trainer", "colour": "red"})

    @staticmethod
    def no_such_key() -> None:
        OmegaConf.create({"a": "${b}"}).a  # noqa: B018

    @staticmethod
    def no_memory() -> None:
        torch.empty(2**62, dtype=torch.int8)

    @staticmethod
    def no_file() -> None:
        Path("/nowhere/at/all").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misconfiguration", "a setting cannot be used: .*limit_val_batches"),
        ("no_such_class", "Error locating target 'lightning.Nothing'$"),
        ("no_such_option", ".*unexpected keyword argument 'colour'"),
        ("no_such_key", r"a: Interpolation key 'b' not found. \$\{...\} stands for another setting"),
        ("no_memory", r"out of memory \(.*lower data.batch_size"),
        ("no_file", ".*/nowhere/at/all: No such file or directory"),
    ],
)
def test_errors_of_the_libraries_below_are_one_line(name: str, message: str) -> None:
    with pytest.raises(Exception) as caught:
        getattr(OfLightning, name)()
    printed = in_words(caught.value)
    assert printed is not None, caught.value
    assert re.match(message, printed), printed
    assert "\n" not in printed
